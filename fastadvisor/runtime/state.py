"""The parts of a run by name: everything that a checkpoint must restore.

A part is anything with ``state_dict`` and ``load_state_dict``; a checkpoint is the dict of the parts' states under their names.
A new part of a run is saved by being named once, in the ``parts()`` of what it belongs to.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fastadvisor.errors import UserError
from fastadvisor.runtime import checkpoint
from fastadvisor.runtime.ranks import Ranks

OF_EACH_RANK = "ranks"
"""Key of the list, by rank, of the parts that each rank has of its own."""


@runtime_checkable
class Stateful(Protocol):
    """A part of a run."""

    def state_dict(self) -> Any:
        """Return the state of the part: tensors and plain values, in any nesting of dicts and lists."""
        ...

    def load_state_dict(self, state: Any, /) -> Any:
        """Go on from ``state``."""
        ...


class Checked(ABC):
    """A part whose error messages name the file that was read."""

    @abstractmethod
    def state_dict(self) -> Any:
        """As in :class:`Stateful`."""

    @abstractmethod
    def load_from(self, state: Any, path: Path | str) -> None:
        """Go on from ``state``, which was read from ``path``; a UserError if it is of another run."""


class Value(Checked):
    """A plain value: an attribute of something that holds other things, too.

    Args:
        owner: what has the attribute.
        name: of the attribute.
        kind: its type, which is checked when it is loaded.
    """

    def __init__(self, owner: object, name: str, kind: type) -> None:
        self.owner, self.name, self.kind = owner, name, kind

    def state_dict(self) -> Any:
        """Return the value."""
        return getattr(self.owner, self.name)

    def load_from(self, state: Any, path: Path | str) -> None:
        """Set the value; a TypeError if it is of another type."""
        if not isinstance(state, self.kind):
            raise TypeError(f"{self.name} is {type(state).__name__}")
        setattr(self.owner, self.name, state)


class Fixed(Checked):
    """A plain value that belongs to a run and does not change.

    Args:
        value: as this run has it.
        otherwise: what to say, after the name of the file, where another value is loaded; None accepts it.
    """

    def __init__(self, value: Any, otherwise: str | None = None) -> None:
        self.value, self.otherwise = value, otherwise

    def state_dict(self) -> Any:
        """Return the value."""
        return self.value

    def load_from(self, state: Any, path: Path | str) -> None:
        """Compare; a UserError where it is another one, a TypeError where it is of another type."""
        if not isinstance(state, type(self.value)):
            raise TypeError(f"{type(state).__name__} in place of {type(self.value).__name__}")
        if self.otherwise is not None and state != self.value:
            raise UserError(f"{path} {self.otherwise}")


class Module(Checked):
    """Parameters and buffers of a module.

    Args:
        module: whose they are.
        otherwise: what to say, after the name of the file, where other ones are loaded; None names the first that differs.
    """

    def __init__(self, module: torch.nn.Module, otherwise: str | None = None) -> None:
        self.module, self.otherwise = module, otherwise

    def state_dict(self) -> dict[str, Any]:
        """Return them by name."""
        return self.module.state_dict()

    def load_from(self, state: Any, path: Path | str) -> None:
        """Load them; a UserError where they are another module's."""
        if self.otherwise is not None and state.keys() != self.module.state_dict().keys():
            raise UserError(f"{path} {self.otherwise}")
        checkpoint.load_model_state(self.module, state, path)


class Optimizer(Checked):
    """An optimizer's state, with the implementation that the optimizer has here."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return its state."""
        return self.optimizer.state_dict()

    def load_from(self, state: Any, path: Path | str) -> None:
        """Go on from ``state``."""
        load_optimizer_state(self.optimizer, state)


class RandomStates:
    """Where the generators of torch, CUDA, numpy (legacy) and Python stand."""

    def state_dict(self) -> dict[str, Any]:
        """Return it."""
        return checkpoint.random_states()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        checkpoint.restore_random_states(state)


Part = Stateful | Checked


def save_parts(parts: Mapping[str, Part], own: Mapping[str, Part], ranks: Ranks) -> dict[str, Any]:
    """Return the states of all parts by name. All ranks together; rank 0 gets those of all.

    Args:
        parts: that are the same on all ranks.
        own: that each rank has of its own.
        ranks: who they are.
    """
    mine = {name: part.state_dict() for name, part in own.items()}
    return {**{name: part.state_dict() for name, part in parts.items()}, OF_EACH_RANK: ranks.gather(mine)}


def load_parts(
    state: Mapping[str, Any],
    path: Path | str,
    parts: Mapping[str, Part],
    own: Mapping[str, Part] | None = None,
    ranks: Ranks | None = None,
    drawn_alone: tuple[str, ...] = (),
) -> None:
    """Go on from what :func:`save_parts` returned, by any number of ranks.

    Args:
        state: of all parts.
        path: of the file it was read from.
        parts: that are the same on all ranks.
        own: that each rank has of its own; of another number of ranks than before all take rank 0's.
        ranks: who they are.
        drawn_alone: those of ``own`` that begin anew, instead, where the number of ranks is another.

    Raises:
        UserError: it is of another run.
    """
    for name, part in parts.items():
        _load(part, state[name], path)
    if own is None or ranks is None:
        return
    everyone = state[OF_EACH_RANK]
    if not isinstance(everyone, list):
        raise TypeError(f"{OF_EACH_RANK} is {type(everyone).__name__}")
    as_before = len(everyone) == ranks.count
    mine = everyone[ranks.rank if as_before else 0]
    for name, part in own.items():
        if as_before or name not in drawn_alone:
            _load(part, mine[name], path)


def _load(part: Part, state: Any, path: Path | str) -> None:
    if isinstance(part, Checked):
        part.load_from(state, path)
    elif not isinstance(state, dict):
        raise TypeError(f"{type(part).__name__} is {type(state).__name__}")
    else:
        part.load_state_dict(state)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Continue from ``state``, a state dict, with the implementation that ``optimizer`` has here: whether it is fused depends
    on the machine and on what the run is watched for, and torch would take it from the state dict.
    """
    own = [group.get("fused") for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, fused in zip(optimizer.param_groups, own, strict=True):
        if group.get("fused") == fused:
            continue
        group["fused"] = fused
        for parameter in group["params"]:  # a fused optimizer counts its steps on the device
            step = optimizer.state[parameter].get("step") if parameter in optimizer.state else None
            if isinstance(step, Tensor):
                optimizer.state[parameter]["step"] = step.to(parameter.device if fused else "cpu")
