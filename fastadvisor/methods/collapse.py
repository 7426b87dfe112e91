"""Detects an advisor whose outputs are saturated, so that it cannot learn any more."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastadvisor.methods.base import GATES, Advice

SATURATED = 4.6
"""Smallest |u| at which σ(u) is below 0.01 or above 0.99."""
COLLAPSED_FRACTION = 0.99
"""Fraction of saturated entries from which on the advisor counts as collapsed: its gradient is almost zero then."""


@dataclass
class Collapse:
    """Detects that nearly all entries of the mask or of the equalisation are at an end of their range."""

    said: set[str] = field(default_factory=set)
    """Names of the outputs of which the user has been warned."""

    def look(self, advice: Advice | None) -> dict[str, float]:
        """Return the fraction of saturated entries in ``advice``, by ``<output>_saturated``. Reads from the device."""
        return {
            f"{name}_saturated": float((value.abs() > SATURATED).float().mean())
            for name, value in ({} if advice is None else advice.outputs).items()
            if name in GATES
        }

    def sentence(self, fractions: Mapping[str, float]) -> str | None:
        """Return a warning the first time that an output has collapsed, else None; ``fractions`` are those of :meth:`look`."""
        for key, fraction in fractions.items():
            name = key.removesuffix("_saturated")
            if fraction >= COLLAPSED_FRACTION and name not in self.said:
                self.said.add(name)
                return (
                    f"The advisor has collapsed: {100 * fraction:.1f} % of its {name} is all but 0 or 1, where it cannot learn "
                    "any more (said once). Lower --advisor-lr, raise --advisor-weight-decay, or take more meta images."
                )
        return None
