"""MFRW and MES together, from one embedding (paper 3.5)."""

from dataclasses import dataclass

import torch

from fastadvisor.config import AdvisorConfig
from fastadvisor.methods.advisor import Advisor
from fastadvisor.methods.base import Advice, DataFacts, Method, Seen
from fastadvisor.methods.beta import BetaSettings, draw_beta
from fastadvisor_kernels import Beta


class MFRWMES(Method):
    """Equalised softmax cross-entropy on masked features."""

    @dataclass
    class Settings(BetaSettings, AdvisorConfig):
        """Those of the advisor and of β."""

    def __init__(self, settings: Settings, features: int, facts: DataFacts) -> None:
        super().__init__(settings, features, facts)
        self.advisor = Advisor(features, facts.classes, settings.advisor_width, mask=True, equalisation=True)

    def draw(self, rows: int, device: torch.device) -> Beta:
        """Return this iteration's β."""
        return draw_beta(self.settings, rows, self.facts.classes, device)

    def advise(self, seen: Seen) -> Advice:
        """Return mask and equalisation."""
        assert self.advisor is not None
        u_BD, v_BC = self.advisor(seen.features, seen.losses)
        return Advice(mask=u_BD, equalisation=v_BC, beta=seen.draw)
