"""Meta Feature Re-Weighting, MFRW (advisor paper, section 3.3): the advisor masks the features."""

from dataclasses import dataclass

from fastadvisor.config import AdvisorConfig
from fastadvisor.methods.advisor import Advisor
from fastadvisor.methods.base import Advice, DataFacts, Method, Seen


class MFRW(Method):
    """Cross-entropy on f ⊙ σ(u) (equation 3); in the meta loss and at test time the features are not masked."""

    @dataclass
    class Settings(AdvisorConfig):
        """The settings of the advisor."""

    def __init__(self, settings: Settings, features: int, facts: DataFacts) -> None:
        super().__init__(settings, features, facts)
        self.advisor = Advisor(features, facts.classes, settings.advisor_width, mask=True, equalisation=False)

    def advise(self, seen: Seen) -> Advice:
        """Return the mask u (B, D)."""
        assert self.advisor is not None
        u_BD, _ = self.advisor(seen.features, seen.losses)
        return Advice(mask=u_BD)
