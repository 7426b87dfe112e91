"""Meta-Weight-Net (Shu et al. 2019): a network from a sample's loss to its weight."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from fastadvisor.config import AdvisorConfig
from fastadvisor.methods.base import Advice, DataFacts, Method, Seen


class MWNet(Method):
    """mean V(ℓ_i) ℓ_i with V: 1 → 100 → ReLU → 1 → sigmoid; weights as they are (noise) or summing to 1 (long tail)."""

    @dataclass
    class Settings(AdvisorConfig):
        """Those of the network, and what is done to the weights."""

        weight_normalization: Literal["none", "sum"] = "none"
        """none for label noise (mean of weighted losses), sum for long tails (weights sum to 1)."""

    @classmethod
    def needs_whole_batch(cls, settings: Settings) -> str | None:
        """Return the normalisation that sums over the batch, if it is asked for."""
        return "--weight-normalization sum" if settings.weight_normalization == "sum" else None

    advisor_lr: ClassVar[float] = 1e-3
    advisor_weight_decay: ClassVar[float] = 1e-4

    def __init__(self, settings: Settings, features: int, facts: DataFacts) -> None:
        super().__init__(settings, features, facts)
        width = settings.advisor_width
        self.advisor = nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, 1), nn.Sigmoid())

    def advise(self, seen: Seen) -> Advice:
        """Return one weight a sample."""
        assert self.advisor is not None
        weight_B = self.advisor(seen.losses[:, None]).squeeze(1)
        if self.settings.weight_normalization == "sum":
            # The loss takes a mean: weights whose mean is 1 there are weights that sum to 1 in a sum.
            weight_B = weight_B / self.batch_mean(weight_B).clamp_min(1e-8)
        return Advice(weight=weight_B)
