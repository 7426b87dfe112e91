"""Meta Feature Re-Weighting: the advisor masks the features (paper 3.3)."""

from torch import Tensor

from fastadvisor.advisor import Advisor
from fastadvisor.config import MethodConfig
from fastadvisor.methods.base import Advice, Method
from fastadvisor_kernels import Beta


class MFRW(Method):
    """Cross-entropy on f ⊙ σ(u); unmasked at the meta step and at test time."""

    def __init__(self, config: MethodConfig, features: int, classes: int) -> None:
        super().__init__(config, features, classes)
        self.advisor = Advisor(features, classes, config.advisor_width, mask=True, equalisation=False)

    def advise(self, f_BD: Tensor, loss_B: Tensor, labels: Tensor, draw: Beta) -> Advice:
        """Return the mask."""
        assert self.advisor is not None
        u_BD, _ = self.advisor(f_BD, loss_B)
        return Advice(mask=u_BD)
