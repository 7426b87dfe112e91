"""What an epoch has added up so far: enough to save in its middle and go on as if nothing had happened."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastadvisor.iterations import StepResult
from fastadvisor.runtime.ranks import Ranks


class Progress:
    """Sums over the iterations of an epoch; losses stay on the device, where adding them waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self.step = 0
        """Iterations taken."""
        self.images = 0
        """Trained on, by this rank."""
        self.steps = 0
        """Those whose losses are in the sums: the others were left out."""
        self.meta_steps = 0
        self.seconds = 0.0
        self.waited = 0.0
        """Of these, without a batch to train on."""
        self.saturated: dict[str, float] = {}
        """What the advisor's outputs looked like when it was saved, for an epoch that is continued after its last step."""
        self.losses: Tensor = torch.zeros(2, device=device)
        """Of the training and of the meta batches."""

    def add(self, result: StepResult, images: int) -> None:
        """Count an iteration."""
        self.step += 1
        self.images += images
        if result.skipped:
            return
        self.steps += 1
        self.losses[0] += result.loss
        if result.meta_loss is not None:
            self.losses[1] += result.meta_loss
            self.meta_steps += 1

    def means(self, ranks: Ranks) -> tuple[float, float | None]:
        """Return the mean training loss and the mean meta loss (None without a meta step), over all ranks."""
        (sums,) = ranks.average([self.losses])
        loss, meta_loss = sums.tolist()
        return loss / self.steps if self.steps else float("nan"), meta_loss / self.meta_steps if self.meta_steps else None

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as CPU tensors and plain values."""
        return {**self.__dict__, "saturated": dict(self.saturated), "losses": self.losses.cpu().clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self.losses = state["losses"].to(self.losses.device)
        self.step, self.steps, self.meta_steps = int(state["step"]), int(state["steps"]), int(state["meta_steps"])
        self.images = int(state["images"])
        self.saturated = {str(name): float(share) for name, share in state["saturated"].items()}
        self.seconds, self.waited = float(state["seconds"]), float(state["waited"])
