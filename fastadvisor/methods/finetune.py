"""Cross-entropy on the training set, then on the meta-set."""

from dataclasses import dataclass

from fastadvisor.config import Fraction, Positive
from fastadvisor.methods.base import Method
from fastadvisor.methods.stages import Stage


class Finetune(Method):
    """Cross-entropy; the last ``finetune_fraction`` of the epochs is spent on the meta-set, with a lower learning rate."""

    @dataclass
    class Settings:
        """The settings of the second stage."""

        finetune_fraction: Fraction = 0.2
        """Last part of the epochs, spent on the meta-set."""
        finetune_lr_factor: Positive = 0.1
        """Learning rate of that part, over --lr."""

    def stages(self) -> tuple[Stage, ...]:
        """Return the two stages: the training set, then the meta-set."""
        fraction = self.settings.finetune_fraction
        return Stage("train", 1 - fraction), Stage("meta", fraction, self.settings.finetune_lr_factor)
