"""Torch's random state at one point, for a pass that must draw the same numbers again; and what several ranks draw alike."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadvisor.runtime.share import WHOLE, Share


class RandomState(NamedTuple):
    """Torch's random state at the start of a forward pass, for passes that must drop the same units."""

    cpu: Tensor
    cuda: dict[int, Tensor]

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        """Record the state."""
        if device.type != "cuda":
            return cls(torch.get_rng_state(), {})
        index = torch.cuda.current_device() if device.index is None else device.index
        return cls(torch.get_rng_state(), {index: torch.cuda.get_rng_state(index)})

    def restore(self) -> None:
        """Put the recorded state back."""
        torch.set_rng_state(self.cpu)
        for index, state in self.cuda.items():
            torch.cuda.set_rng_state(state, index)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Run the block from the recorded state, and put today's state back after it."""
        with torch.random.fork_rng(devices=list(self.cuda)):
            self.restore()
            yield

    def to_plain(self) -> dict[str, Any]:
        """Return it as a checkpoint holds it, without the number of the GPU."""
        return {"cpu": self.cpu, "cuda": next(iter(self.cuda.values()), None)}

    @classmethod
    def from_plain(cls, state: Mapping[str, Any], device: torch.device) -> "RandomState":
        """Return what :meth:`to_plain` was taken of, for ``device``; a GPU that was not used then goes on from today's."""
        now = cls.now(device)
        cuda = now.cuda if state["cuda"] is None else dict.fromkeys(now.cuda, state["cuda"])
        return cls(state["cpu"], cuda)


class CommonRandomness:
    """What all ranks draw alike, for the batch as a whole, of which each then takes its rows.

    So several ranks draw what one process would. That one has a single stream, torch's own; of several, each has a second
    one of its own, for what belongs to its images alone, such as the units that dropout drops.

    Args:
        device: to draw on.
        share: what of a batch is this rank's.
    """

    def __init__(self, device: torch.device, share: Share = WHOLE) -> None:
        self.device, self.share = device, share
        self._state: RandomState | None = None
        """Of the common stream; None: it is torch's own."""

    def split_off(self) -> None:
        """Let the common stream go on from where torch's own stands; the caller then moves the latter."""
        self._state = RandomState.now(self.device)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Draw from the common stream inside the block."""
        if self._state is None:
            yield
            return
        with self._state.replayed():
            yield
            self._state = RandomState.now(self.device)

    def state_dict(self) -> dict[str, Any]:
        """Return where the common stream stands."""
        return (RandomState.now(self.device) if self._state is None else self._state).to_plain()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``, that of one process or of several, as one process or as several."""
        found = RandomState.from_plain(state, self.device)
        if self.share.ranks > 1:
            self._state = found
        else:
            found.restore()
