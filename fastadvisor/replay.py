"""The step at which a run met values that are not finite: ``replay.pt``, which the run leaves, and ``fastadvisor replay``,
which takes the step again and finds where they begin.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastadvisor.assembly import build_step
from fastadvisor.config import Config, to_dict, validated
from fastadvisor.data import Batch
from fastadvisor.errors import UserError
from fastadvisor.methods import build_method
from fastadvisor.models import build_model
from fastadvisor.runtime import checkpoint
from fastadvisor.runtime.execution import Execution
from fastadvisor.runtime.precision import amp_dtype, pick_device
from fastadvisor.runtime.random_state import CommonRandomness, RandomState
from fastadvisor.runtime.share import Share
from fastadvisor.step import Step
from fastadvisor.watch import NonFiniteError, distance_to_cause

if TYPE_CHECKING:
    from fastadvisor.trainer import Trainer


def before(trainer: "Trainer", *, with_meta_step: bool) -> dict[str, Any]:
    """Return copies of what a step changes before it is known whether it is finite: little, for the weights come last."""
    kept: dict[str, Any] = {
        "random_before": RandomState.now(trainer.device).to_plain(),
        "common_before": trainer.execution.common.state_dict(),
    }
    advisor, optimizer = trainer.method.advisor, trainer.step.advisor_optimizer
    if with_meta_step and advisor is not None and optimizer is not None:
        kept["advisor"] = copy.deepcopy(advisor.state_dict())
        kept["advisor_optimizer"] = copy.deepcopy(optimizer.state_dict())
    return kept


def record(
    trainer: "Trainer", path: Path, kept: dict[str, Any], train: Batch, meta: Batch | None, name: str
) -> tuple[str, str]:
    """Write what is needed to take the step again: all ranks' batches, and the state before it. All ranks together.

    Args:
        trainer: after the step, whose weights it has not reached.
        path: of ``replay.pt``.
        kept: what :func:`before` returned.
        train: this rank's batch.
        meta: its meta batch, if there was one.
        name: of the tensor that is not finite on this rank.

    Returns:
        The name of the tensor nearest to the cause on any rank, and some ids of that rank's batch.
    """
    ranks = trainer.ranks
    batches = ranks.gather([None if part is None else [tensor.cpu() for tensor in part] for part in (train, meta)])
    # A rank whose own values are bad spoils the others' gradients: it is the one to be named.
    told = ranks.gather((name, train.ids[:8].tolist()))
    name, some = ranks.share(min(told, key=lambda one: distance_to_cause(one[0])) if told else None)
    state = {**trainer.state(), **kept, "batches": batches, "name": name, "config": to_dict(trainer.config)}
    if ranks.first:
        checkpoint.save(path, state)
    return name, ", ".join(map(str, some)) + (", ..." if len(train.ids) > 8 else "")


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
    with checkpoint.fitting(path):
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


def _rebuilt(state: dict[str, Any], train: Batch, device: torch.device, path: Path) -> Step:
    config = validated(Config, {**state["config"], "pretrained": False, "weights": None, "nan_policy": "stop"})
    shape = (int(train.images.shape[2]), int(train.images.shape[3]))
    execution = Execution(device, amp_dtype(config.amp_dtype, device) if config.amp else None)
    model = build_model(config, len(state["classes"]), shape)
    checkpoint.load_model_state(model.model, state["model"], path)
    method = build_method(config, model.head.in_features, len(state["classes"]))
    model.to(device)
    if method.advisor is not None:
        method.advisor.to(device)
    step = build_step(config, model, method, execution, shape)
    step.optimizer.load_state_dict(state["optimizer"])
    if method.advisor is not None and step.advisor_optimizer is not None:
        checkpoint.load_model_state(method.advisor, state["advisor"], path)
        step.advisor_optimizer.load_state_dict(state["advisor_optimizer"])
    step.engine.load_state_dict(state["engine"])
    execution.load_state_dict(state["execution"])
    step.iteration = state["iteration"] - 1
    return step


def _take(step: Step, state: dict[str, Any], train: Batch, meta: Batch | None) -> dict[str, Any]:
    device = step.execution.device
    train = Batch(*(tensor.to(device) for tensor in train))
    meta = None if meta is None else Batch(*(tensor.to(device) for tensor in meta))
    before = RandomState.of_plain(state["random_before"], device)
    peaks: list[tuple[str, float]] = []
    modules: dict[str, nn.Module] = {"classifier": step.model.model}
    if step.method.advisor is not None:
        modules["advisor"] = step.method.advisor
    name: str | None = None
    step.model.train()
    with before.replayed(), _listening(modules, peaks):
        try:
            step(train, meta)
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
