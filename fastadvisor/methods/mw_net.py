"""Meta-Weight-Net (Shu et al. 2019): a network maps the loss of each sample to its weight."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from fastadvisor.config import AdvisorConfig
from fastadvisor.methods.base import Advice, DataFacts, Method, Seen


class MWNet(Method):
    """mean_i V(ℓ_i) ℓ_i, where V is a network 1 → 100 → ReLU → 1 → sigmoid.

    The weights are used as they are (label noise), or scaled to sum to 1 (long tails).
    """

    @dataclass
    class Settings(AdvisorConfig):
        """The settings of the network, and of the weights' normalisation."""

        weight_normalization: Literal["none", "sum"] = "none"
        """none for label noise (mean of weighted losses), sum for long tails (weights sum to 1)."""

    @classmethod
    def needs_whole_batch(cls, settings: Settings) -> str | None:
        """Return the flag of the normalisation, which sums over the whole batch, if it is set."""
        return "--weight-normalization sum" if settings.weight_normalization == "sum" else None

    advisor_lr: ClassVar[float] = 1e-3
    advisor_weight_decay: ClassVar[float] = 1e-4

    def __init__(self, settings: Settings, features: int, facts: DataFacts) -> None:
        super().__init__(settings, features, facts)
        width = settings.advisor_width
        self.advisor = nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, 1), nn.Sigmoid())

    def advise(self, seen: Seen) -> Advice:
        """Return the weight of each sample, (B,)."""
        assert self.advisor is not None
        weight_B = self.advisor(seen.losses[:, None]).squeeze(1)
        if self.settings.weight_normalization == "sum":
            # The loss is a mean over samples: there, weights with a mean of 1 stand for weights that sum to 1 in a sum.
            weight_B = weight_B / self.batch_mean(weight_B).clamp_min(1e-8)
        return Advice(weight=weight_B)
