"""What goes wrong in numbers: values that are not finite, and an advisor that has stopped advising."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastadvisor.methods import Advice
from fastadvisor.runtime.ranks import ALONE, Ranks

SATURATED = 4.6
"""|u| from which σ(u) is under 0.01 or over 0.99."""
COLLAPSED_SHARE = 0.99
"""Share of saturated entries from which the advisor counts as collapsed: its gradient there is next to nothing."""


OTHERS = "a tensor of another process"


CAUSES = ("the advisor's", "the training loss", "the meta loss", "the meta-gradient", "the gradient")
"""Tensors by how near they are to the images they come from: from the meta loss on, other ranks' images have a part in them."""


def distance_to_cause(name: str) -> int:
    """Return the place of a tensor's name in ``CAUSES``; that of no tensor is the last."""
    return next((place for place, start in enumerate(CAUSES) if name.startswith(start)), len(CAUSES))


class NonFiniteError(Exception):
    """A tensor of a step holds infinities or NaN."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name
        """Of the tensor, in words."""


@dataclass
class Watch:
    """Looks at an iteration's numbers before they reach any weight.

    It waits for the device, once before the advisor's step and once before the classifier's. All ranks get the same answer.
    """

    skip: bool = False
    """Leave the step out and count it, rather than raise."""
    gradients: bool = True
    """Off where a gradient scaler looks at gradients itself, and leaves out steps as a matter of course."""
    ranks: Ranks = ALONE
    skipped: int = 0

    def passes(self, values: Mapping[str, Tensor | None], gradients: Mapping[str, Tensor | None]) -> bool:
        """Return whether all of it is finite.

        Raises:
            NonFiniteError: it is not, and steps are not to be skipped.
        """
        named = {
            name: value for name, value in {**values, **(gradients if self.gradients else {})}.items() if value is not None
        }
        peaks = torch.stack([peak.float() for peak in torch._foreach_norm(list(named.values()), torch.inf)])
        if not bool(self.ranks.any(~peaks.isfinite().all())):
            return True
        if not self.skip:
            names = [name for name, peak in zip(named, peaks.tolist(), strict=True) if not abs(peak) < float("inf")]
            raise NonFiniteError(names[0] if names else OTHERS)
        self.skipped += 1
        return False


@dataclass
class Collapse:
    """Notices when the masks or the equalisation of an epoch are nearly all at an end of their range."""

    said: set[str] = field(default_factory=set)

    def look(self, advice: Advice | None) -> dict[str, float]:
        """Return the share of saturated entries of the last batch, by output."""
        outputs = {} if advice is None else {"mask": advice.mask, "equalisation": advice.equalisation}
        return {
            f"{name}_saturated": float((value.abs() > SATURATED).float().mean())
            for name, value in outputs.items()
            if value is not None
        }

    def sentence(self, shares: Mapping[str, float]) -> str | None:
        """Return what to tell the user, the first time that an output has collapsed."""
        for key, share in shares.items():
            name = key.removesuffix("_saturated")
            if share >= COLLAPSED_SHARE and name not in self.said:
                self.said.add(name)
                return (
                    f"The advisor has collapsed: {100 * share:.1f} % of its {name} is all but 0 or 1, where it cannot learn "
                    "any more (said once). Lower --advisor-lr, raise --advisor-weight-decay, or take more meta images."
                )
        return None
