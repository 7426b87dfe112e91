"""``fastadvisor replay``: take the iteration again in which a run met values that are not finite, and find where they begin."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadvisor.config import Config, validate
from fastadvisor.errors import UserError
from fastadvisor.iterations import Iteration
from fastadvisor.loading import Batch
from fastadvisor.methods import DataFacts, build_method
from fastadvisor.models import build_model
from fastadvisor.runtime import checkpoint
from fastadvisor.runtime.execution import Execution
from fastadvisor.runtime.precision import amp_dtype, memory_format, pick_device
from fastadvisor.runtime.random_state import CommonRandomness, RandomState
from fastadvisor.runtime.share import Share
from fastadvisor.runtime.state import Module, load_parts
from fastadvisor.runtime.watch import NonFiniteError
from fastadvisor.training.assembly import build_step


def replay(run: str | os.PathLike[str], *, device: str = "auto") -> dict[str, Any]:
    """Take the step in RUN/replay.pt again, with every rank's batch in turn, and look at what each module puts out.

    Returns:
        ``iteration``; ``said`` (the tensor the run named); ``found`` (the one named now, None where all is finite, such as on
        another device); ``first`` (the first module whose output is not finite, None where it is the loss or a gradient);
        ``rank`` of the batch; ``ids`` of its images; ``peaks``, the largest absolute output of each module in order.

    Raises:
        UserError: there is no such state, or it is damaged.
    """
    named = Path(run).expanduser()
    path = named / "replay.pt" if named.is_dir() else named
    if not path.is_file():
        raise UserError(f"There is no {path}: a run writes one when it meets values that are not finite and is to stop then.")
    state = checkpoint.load(path)
    found: dict[str, Any] = {}
    with checkpoint.refuse_misfit(path):
        for rank, batches in enumerate(state["batches"]):
            train, meta = (None if part is None else Batch(*part) for part in batches)
            assert train is not None
            step = _rebuilt(state, train, pick_device(device), path)
            step.execution.common = CommonRandomness(step.execution.device, Share(rank, len(state["batches"])))
            step.execution.common.load_state_dict(state["common_before"])
            found = {"rank": rank, "ids": train.ids.tolist(), **_take(step, state, train, meta)}
            if found["found"] is not None:
                break
        return {"iteration": state["iteration"], "epoch": state["epoch"] + 1, "said": state["name"], **found}


def _rebuilt(state: dict[str, Any], train: Batch, device: torch.device, path: Path) -> Iteration:
    config = validate(Config, {**state["config"], "pretrained": False, "weights": None, "nan_policy": "stop"})
    shape = (int(train.images.shape[2]), int(train.images.shape[3]))
    execution = Execution(device, amp_dtype(config.amp_dtype, device) if config.amp else None)
    model = build_model(config, len(state[checkpoint.CLASSES]), shape)
    method = build_method(config, model.head.in_features, DataFacts.from_plain(state["facts"])).to(device)
    model.to(device).to(memory_format=memory_format(config.memory_format, device, amp=config.amp))
    step = build_step(config, model, method, execution, shape)
    parts = {checkpoint.MODEL: Module(model.model), "method": Module(method), **step.parts(), "execution": execution}
    load_parts(state, path, parts)
    step.iteration -= 1  # it is to be taken again
    return step


def _take(step: Iteration, state: dict[str, Any], train: Batch, meta: Batch | None) -> dict[str, Any]:
    device = step.execution.device
    train = Batch(*(tensor.to(device) for tensor in train))
    meta = None if meta is None else Batch(*(tensor.to(device) for tensor in meta))
    before = RandomState.from_plain(state["random_before"], device)
    peaks: list[tuple[str, float]] = []
    modules: dict[str, nn.Module] = {"classifier": step.model.model}
    if step.method.advisor is not None:
        modules["advisor"] = step.method.advisor
    name: str | None = None
    step.model.train()
    with before.replayed(), _listening(modules, peaks):
        try:
            step(train, meta)
            if step.watch is not None:
                step.watch.settle()
        except NonFiniteError as error:
            name = error.name
    first = next((module for module, peak in peaks if not abs(peak) < float("inf")), None)
    return {"found": name, "first": first, "peaks": peaks}


@contextmanager
def _listening(modules: dict[str, nn.Module], peaks: list[tuple[str, float]]) -> Iterator[None]:
    """Put the largest absolute output of every innermost module into ``peaks``, in the order of the passes."""

    def listen(name: str) -> Any:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                peaks.append((f"{name} ({type(module).__name__})", float(output.detach().abs().max())))

        return note

    handles = [
        module.register_forward_hook(listen(f"{prefix} {name}".strip()))
        for prefix, whole in modules.items()
        for name, module in whole.named_modules()
        if not list(module.children())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
