"""The step at which a run met values that are not finite: ``replay.pt``, which the run leaves, and ``fastadvisor replay``,
which takes the step again and finds where they begin.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastadvisor.assembly import build_step
from fastadvisor.config import Config, to_dict, validated
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
from fastadvisor.runtime.watch import NonFiniteError, distance_to_cause

if TYPE_CHECKING:
    from fastadvisor.training.trainer import Trainer


class Snapshot:
    """Tensors as they were: copied by a launch or two into tensors of the snapshot's own, which are made once."""

    def __init__(self) -> None:
        self._leaves: list[Any] = []
        self._copies: list[Tensor] = []
        self._shape: Any = None

    @torch.no_grad()
    def take(self, state: Any) -> None:
        """Copy what ``state``, nested containers of tensors and plain values, holds now."""
        self._leaves, self._shape = tree_flatten(state)
        tensors = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        if [(one.shape, one.dtype, one.device) for one in tensors] != [(c.shape, c.dtype, c.device) for c in self._copies]:
            self._copies = [torch.empty_like(tensor) for tensor in tensors]
        if tensors:
            torch._foreach_copy_(self._copies, tensors)

    def state(self) -> Any:
        """Return what :meth:`take` was last given, as it was then."""
        copies = iter(self._copies)
        return tree_unflatten([next(copies) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves], self._shape)


class Beginning:
    """What an iteration began with: little, for the weights come last, and only if all is finite."""

    def __init__(self) -> None:
        self.iteration = 0
        self._moved = Snapshot()
        """What an iteration moves before its numbers are known to be finite."""

    def take(self, trainer: "Trainer", train: Batch, meta: Batch | None) -> None:
        """Note what the next iteration of ``trainer`` begins with."""
        step = trainer.step
        self.iteration, self.train, self.meta = step.iteration + 1, train, meta
        self.random, self.common = RandomState.now(trainer.device), trainer.execution.common.state_dict()
        self.rates = [group["lr"] for group in step.optimizer.param_groups]
        self.fresh = not step.optimizer.state
        parts = {"method": trainer.method, **({} if step.meta_train is None else step.meta_train.parts())}
        self._moved.take((dict(trainer.model.model.named_buffers()), {name: one.state_dict() for name, one in parts.items()}))

    def put_back(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return ``state``, a checkpoint of after the iteration, with what has moved since as it was before."""
        buffers, parts = self._moved.state()
        model = state[checkpoint.MODEL]
        optimizer = dict(state["optimizer"])
        if self.fresh:  # a fused step that is not taken leaves momentum that nobody has written
            optimizer["state"] = {}
        groups = zip(optimizer["param_groups"], self.rates, strict=True)
        optimizer["param_groups"] = [{**group, "lr": rate} for group, rate in groups]
        return {
            **state,
            **parts,
            checkpoint.MODEL: {**model, **{name: value for name, value in buffers.items() if name in model}},
            "optimizer": optimizer,
            "iteration": self.iteration,
            "random_before": self.random.to_plain(),
            "common_before": self.common,
        }


class Recorder:
    """The beginnings of the last two iterations: that one was bad may show an iteration later (:class:`Watch`)."""

    def __init__(self) -> None:
        self._beginnings = Beginning(), Beginning()

    def begin(self, trainer: "Trainer", train: Batch, meta: Batch | None) -> None:
        """Note what the next iteration begins with."""
        self._beginnings[(trainer.step.iteration + 1) % 2].take(trainer, train, meta)

    def write(self, trainer: "Trainer", path: Path, iteration: int, name: str) -> tuple[str, str]:
        """Write what is needed to take an iteration again: all ranks' batches, and the state before it. All ranks together.

        Args:
            trainer: after the iteration, or the one after it; neither has reached the weights.
            path: of ``replay.pt``.
            iteration: its number.
            name: of the tensor that is not finite on this rank.

        Returns:
            The name of the tensor nearest to the cause on any rank, and some ids of that rank's batch.
        """
        ranks, begun = trainer.ranks, self._beginnings[iteration % 2]
        assert begun.iteration == iteration
        batches = ranks.gather([None if part is None else [one.cpu() for one in part] for part in (begun.train, begun.meta)])
        # A rank whose own values are bad spoils the others' gradients: it is the one to be named.
        told = ranks.gather((name, begun.train.ids[:8].tolist()))
        name, some = ranks.share(min(told, key=lambda one: distance_to_cause(one[0])) if told else None)
        state = trainer.state()
        if ranks.first:
            checkpoint.save(
                path, {**begun.put_back(state), "batches": batches, "name": name, "config": to_dict(trainer.config)}
            )
        return name, ", ".join(map(str, some)) + (", ..." if len(begun.train.ids) > 8 else "")


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


def _rebuilt(state: dict[str, Any], train: Batch, device: torch.device, path: Path) -> Iteration:
    config = validated(Config, {**state["config"], "pretrained": False, "weights": None, "nan_policy": "stop"})
    shape = (int(train.images.shape[2]), int(train.images.shape[3]))
    execution = Execution(device, amp_dtype(config.amp_dtype, device) if config.amp else None)
    model = build_model(config, len(state[checkpoint.CLASSES]), shape)
    method = build_method(config, model.head.in_features, DataFacts.of_plain(state["facts"])).to(device)
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
