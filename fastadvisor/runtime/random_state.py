"""Torch's random state at one point, for a pass that must draw the same numbers again."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


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

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Run the block from the recorded state, and put today's state back after it."""
        with torch.random.fork_rng(devices=list(self.cuda)):
            torch.set_rng_state(self.cpu)
            for index, state in self.cuda.items():
                torch.cuda.set_rng_state(state, index)
            yield
