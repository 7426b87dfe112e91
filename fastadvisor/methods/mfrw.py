"""Meta Feature Re-Weighting: the advisor masks the features (paper 3.3)."""

from dataclasses import dataclass

from fastadvisor.config import AdvisorConfig
from fastadvisor.methods.advisor import Advisor
from fastadvisor.methods.base import Advice, DataFacts, Method, Seen


class MFRW(Method):
    """Cross-entropy on f ⊙ σ(u); unmasked at the meta step and at test time."""

    @dataclass
    class Settings(AdvisorConfig):
        """Those of the advisor."""

    def __init__(self, settings: Settings, features: int, facts: DataFacts) -> None:
        super().__init__(settings, features, facts)
        self.advisor = Advisor(features, facts.classes, settings.advisor_width, mask=True, equalisation=False)

    def advise(self, seen: Seen) -> Advice:
        """Return the mask."""
        assert self.advisor is not None
        u_BD, _ = self.advisor(seen.features, seen.losses)
        return Advice(mask=u_BD)
