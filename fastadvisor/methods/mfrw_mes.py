"""MFRW-MES: feature mask and equalised softmax together, from one embedding (advisor paper, section 3.5)."""

from dataclasses import dataclass

import torch

from fastadvisor.config import AdvisorConfig
from fastadvisor.methods.advisor import Advisor
from fastadvisor.methods.base import Advice, DataFacts, Method, Seen
from fastadvisor.methods.beta import BetaSettings, draw_beta
from fastadvisor_kernels import Beta


class MFRWMES(Method):
    """Equalised softmax cross-entropy (equations 6 and 8) on masked features (equation 3)."""

    @dataclass
    class Settings(BetaSettings, AdvisorConfig):
        """The settings of the advisor and of β."""

    def __init__(self, settings: Settings, features: int, facts: DataFacts) -> None:
        super().__init__(settings, features, facts)
        self.advisor = Advisor(features, facts.classes, settings.advisor_width, mask=True, equalisation=True)

    def draw(self, rows: int, device: torch.device) -> Beta:
        """Return β for ``rows`` samples in this iteration."""
        return draw_beta(self.settings, rows, self.facts.classes, device)

    def advise(self, seen: Seen) -> Advice:
        """Return the mask u (B, D), the equalisation v (B, C), and β."""
        assert self.advisor is not None
        u_BD, v_BC = self.advisor(seen.features, seen.losses)
        return Advice(mask=u_BD, equalisation=v_BC, beta=seen.draw)
