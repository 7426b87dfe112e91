"""Meta Equalization Softmax: the advisor softens the pull of the other classes (paper 3.4)."""

import torch
from torch import Tensor

from fastadvisor.advisor import Advisor
from fastadvisor.config import MethodConfig
from fastadvisor.methods.base import Advice, Method
from fastadvisor.methods.beta import draw_beta
from fastadvisor_kernels import Beta


class MES(Method):
    """Equalised softmax cross-entropy on plain features."""

    def __init__(self, config: MethodConfig, features: int, classes: int) -> None:
        super().__init__(config, features, classes)
        self.advisor = Advisor(features, classes, config.advisor_width, mask=False, equalisation=True)

    def draw(self, rows: int, device: torch.device) -> Beta:
        """Return this iteration's β."""
        return draw_beta(self.config, rows, self.classes, device)

    def advise(self, f_BD: Tensor, loss_B: Tensor, labels: Tensor, draw: Beta) -> Advice:
        """Return the equalisation."""
        assert self.advisor is not None
        _, v_BC = self.advisor(f_BD, loss_B)
        return Advice(equalisation=v_BC, beta=draw)
