"""Cross-entropy on everything, then on the meta-set."""

from dataclasses import dataclass

from fastadvisor.config import Fraction, Positive
from fastadvisor.methods.base import Method
from fastadvisor.methods.stages import Stage


class Finetune(Method):
    """The last ``finetune_fraction`` of the epochs trains on the meta-set at ``finetune_lr_factor`` of the rate."""

    @dataclass
    class Settings:
        """The second part of the run."""

        finetune_fraction: Fraction = 0.2
        """Last part of the epochs, spent on the meta-set."""
        finetune_lr_factor: Positive = 0.1
        """Learning rate of that part, over --lr."""

    def stages(self) -> tuple[Stage, ...]:
        """Return the two stages."""
        fraction = self.settings.finetune_fraction
        return Stage("train", 1 - fraction), Stage("meta", fraction, self.settings.finetune_lr_factor)
