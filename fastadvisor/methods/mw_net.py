"""Meta-Weight-Net (Shu et al. 2019): a network from a sample's loss to its weight."""

from typing import ClassVar

from torch import Tensor, nn

from fastadvisor.config import MethodConfig
from fastadvisor.methods.base import Advice, Method
from fastadvisor_kernels import Beta


class MWNet(Method):
    """mean V(ℓ_i) ℓ_i with V: 1 → 100 → ReLU → 1 → sigmoid; weights as they are (noise) or summing to 1 (long tail)."""

    advisor_lr: ClassVar[float] = 1e-3
    advisor_weight_decay: ClassVar[float] = 1e-4

    def __init__(self, config: MethodConfig, features: int, classes: int) -> None:
        super().__init__(config, features, classes)
        width = config.advisor_width
        self.advisor = nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, 1), nn.Sigmoid())

    @classmethod
    def needs_whole_batch(cls, settings: MethodConfig) -> str | None:
        """Return the normalisation that sums over the batch, if it is asked for."""
        return "--weight-normalization sum" if settings.weight_normalization == "sum" else None

    def advise(self, f_BD: Tensor, loss_B: Tensor, labels: Tensor, draw: Beta) -> Advice:
        """Return one weight a sample."""
        assert self.advisor is not None
        weight_B = self.advisor(loss_B[:, None]).squeeze(1)
        if self.config.weight_normalization == "sum":
            # The loss takes a mean: weights whose mean is 1 there are weights that sum to 1 in a sum.
            weight_B = weight_B / self.batch_mean(weight_B).clamp_min(1e-8)
        return Advice(weight=weight_B)
