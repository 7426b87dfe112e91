"""The random state of torch at one point, for a pass that must draw the same numbers again; and random numbers that all ranks
share.
"""

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
        """Run the block from the recorded state, and restore the present state after it."""
        with torch.random.fork_rng(devices=list(self.cuda)):
            self.restore()
            yield

    def to_plain(self) -> dict[str, Any]:
        """Return the state as a checkpoint stores it, without the index of the GPU."""
        return {"cpu": self.cpu, "cuda": next(iter(self.cuda.values()), None)}

    @classmethod
    def from_plain(cls, state: Mapping[str, Any], device: torch.device) -> "RandomState":
        """Return the state that :meth:`to_plain` returned, for ``device``; a GPU that is not in it keeps its present state."""
        now = cls.now(device)
        cuda = now.cuda if state["cuda"] is None else dict.fromkeys(now.cuda, state["cuda"])
        return cls(state["cpu"], cuda)


class CommonRandomness:
    """Random numbers that all ranks draw alike for the whole batch, of which each rank then takes its rows.

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
        """Start the common stream from the present state of torch's own; the caller then changes the latter."""
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
        """Return the state of the common stream."""
        return (RandomState.now(self.device) if self._state is None else self._state).to_plain()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state``, whether it was saved by one process or by several."""
        found = RandomState.from_plain(state, self.device)
        if self.share.ranks > 1:
            self._state = found
        else:
            found.restore()
