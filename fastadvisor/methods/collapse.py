"""An advisor that has stopped advising."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastadvisor.methods.base import GATES, Advice

SATURATED = 4.6
"""|u| from which σ(u) is under 0.01 or over 0.99."""
COLLAPSED_FRACTION = 0.99
"""Share of saturated entries from which the advisor counts as collapsed: its gradient there is next to nothing."""


@dataclass
class Collapse:
    """Notices when the masks or the equalisation of an epoch are nearly all at an end of their range."""

    said: set[str] = field(default_factory=set)

    def look(self, advice: Advice | None) -> dict[str, float]:
        """Return the fraction of saturated entries of the last batch, by output."""
        return {
            f"{name}_saturated": float((value.abs() > SATURATED).float().mean())
            for name, value in ({} if advice is None else advice.outputs).items()
            if name in GATES
        }

    def sentence(self, fractions: Mapping[str, float]) -> str | None:
        """Return what to tell the user, the first time that an output has collapsed."""
        for key, fraction in fractions.items():
            name = key.removesuffix("_saturated")
            if fraction >= COLLAPSED_FRACTION and name not in self.said:
                self.said.add(name)
                return (
                    f"The advisor has collapsed: {100 * fraction:.1f} % of its {name} is all but 0 or 1, where it cannot learn "
                    "any more (said once). Lower --advisor-lr, raise --advisor-weight-decay, or take more meta images."
                )
        return None
