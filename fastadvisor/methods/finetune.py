"""Cross-entropy on everything, then on the meta-set."""

from fastadvisor.methods.base import Method, Phase


class Finetune(Method):
    """The last ``finetune_fraction`` of the epochs trains on the meta-set at ``finetune_lr_factor`` of the rate."""

    def phases(self) -> list[Phase]:
        """Return the two phases; each runs its own schedule from start to end."""
        fraction = self.config.finetune_fraction
        return [Phase("train", 1 - fraction), Phase("meta", fraction, self.config.finetune_lr_factor)]
