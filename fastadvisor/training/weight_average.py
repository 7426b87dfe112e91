"""An exponential moving average of the classifier's weights."""

import copy
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """An exponential moving average of weights and running statistics, whose decay rises to ``decay`` in the beginning:
    min(decay, (1 + n) / (10 + n)) after n updates, so that a short run is not left with its first weights. The first update
    takes the weights as they are; counts, such as those of batches, are always those of the model.

    It never waits for the device. torch's ``AveragedModel`` does, at each update: it copies its count there, or reads it back.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        """The averaged classifier."""
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights of ``model`` as of now."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.updates else 0.0
        pairs = list(zip(_tensors(self.model), _tensors(model), strict=True))
        moved = [pair for pair in pairs if pair[0].is_floating_point()]
        get_ema_multi_avg_fn(decay)([mean for mean, _ in moved], [value for _, value in moved], None)
        for mean, value in pairs:
            if not mean.is_floating_point():
                mean.copy_(value, non_blocking=True)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the average and the number of updates."""
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]


def _tensors(model: nn.Module) -> "itertools.chain[Tensor]":
    return itertools.chain(model.parameters(), model.buffers())
