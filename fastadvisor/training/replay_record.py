"""What a run leaves of the iteration in which it met values that are not finite: ``replay.pt``.

``fastadvisor replay`` takes that iteration again (commands/replay.py).
"""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastadvisor.config import Config, to_dict
from fastadvisor.errors import UserError
from fastadvisor.iterations import Iteration
from fastadvisor.loading import Batch
from fastadvisor.methods import Method
from fastadvisor.models import SplitClassifier
from fastadvisor.runtime import checkpoint
from fastadvisor.runtime.execution import Execution
from fastadvisor.runtime.random_state import RandomState
from fastadvisor.runtime.ranks import Ranks
from fastadvisor.runtime.run_folder import RunFolder
from fastadvisor.runtime.watch import NonFiniteError, distance_to_cause


class Run(Protocol):
    """What is recorded of a run."""

    config: Config
    step: Iteration
    model: SplitClassifier
    method: Method
    execution: Execution
    device: torch.device
    ranks: Ranks
    folder: RunFolder | None
    epoch: int

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds; all ranks together."""
        ...


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

    def take(self, run: Run, train: Batch, meta: Batch | None) -> None:
        """Note what the next iteration of ``run`` begins with."""
        step = run.step
        self.iteration, self.train, self.meta = step.iteration + 1, train, meta
        self.random, self.common = RandomState.now(run.device), run.execution.common.state_dict()
        self.rates = [group["lr"] for group in step.optimizer.param_groups]
        self.fresh = not step.optimizer.state
        parts = {"method": run.method, **({} if step.meta_train is None else step.meta_train.parts())}
        self._moved.take((dict(run.model.model.named_buffers()), {name: one.state_dict() for name, one in parts.items()}))

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

    def begin(self, run: Run, train: Batch, meta: Batch | None) -> None:
        """Note what the next iteration begins with."""
        self._beginnings[(run.step.iteration + 1) % 2].take(run, train, meta)

    def write(self, run: Run, path: Path, iteration: int, name: str) -> tuple[str, str]:
        """Write what is needed to take an iteration again: all ranks' batches, and the state before it. All ranks together.

        Args:
            run: after the iteration, or the one after it; neither has reached the weights.
            path: of ``replay.pt``.
            iteration: its number.
            name: of the tensor that is not finite on this rank.

        Returns:
            The name of the tensor nearest to the cause on any rank, and some ids of that rank's batch.
        """
        ranks, begun = run.ranks, self._beginnings[iteration % 2]
        assert begun.iteration == iteration
        batches = ranks.gather([None if part is None else [one.cpu() for one in part] for part in (begun.train, begun.meta)])
        # A rank whose own values are bad spoils the others' gradients: it is the one to be named.
        told = ranks.gather((name, begun.train.ids[:8].tolist()))
        name, some = ranks.broadcast(min(told, key=lambda one: distance_to_cause(one[0])) if told else None)
        state = run.state()
        if ranks.first:
            checkpoint.save(path, {**begun.put_back(state), "batches": batches, "name": name, "config": to_dict(run.config)})
        return name, ", ".join(map(str, some)) + (", ..." if len(begun.train.ids) > 8 else "")

    @contextmanager
    def stopping(self, run: Run) -> Iterator[None]:
        """End ``run`` where the watch finds something inside the block, and leave what it takes to take that step again.

        Raises:
            UserError: it does.
        """
        try:
            yield
        except NonFiniteError as error:
            name, number = error.name, error.iteration or run.step.iteration
        else:
            return
        if run.folder is None:
            raise NonFiniteError(name, number)
        name, ids = self.write(run, run.folder.replay, number, name)
        raise UserError(
            f"Iteration {number} (epoch {run.epoch + 1}): {name} is not finite. The batch (ids {ids}) and the state before it "
            f"are in {run.folder.replay}; lower --lr or --advisor-lr, or add --nan-policy skip. To find where it begins: "
            f"fastadvisor replay {shlex.quote(str(run.folder.path))}"
        )
