"""Arguments as an operation of torch.library can take them: numbers, strings and tensors."""

from typing import NamedTuple

from torch import Tensor

from fastadvisor_kernels.bernoulli import Bernoulli
from fastadvisor_kernels.equalization_softmax.reference import Beta, Reduction


class FlatBeta(NamedTuple):
    """β as four plain arguments."""

    value: float
    """β itself, or the probability to draw 1."""
    mask: Tensor | None
    seed: Tensor | None
    first_row: int = 0

    @classmethod
    def of(cls, beta: Beta) -> "FlatBeta":
        """Split ``beta`` into its parts."""
        if isinstance(beta, Bernoulli):
            return cls(beta.probability, None, beta.seed, beta.first_row)
        if isinstance(beta, Tensor):
            return cls(1.0, beta, None)
        return cls(1.0 if beta is None else float(beta), None, None)

    def beta(self) -> Beta:
        """Return the β that :meth:`of` was given."""
        if self.seed is not None:
            return Bernoulli(self.value, self.seed, self.first_row)
        return self.value if self.mask is None else self.mask


class Options(NamedTuple):
    """The keywords of the loss."""

    reduction: Reduction = "none"
    ignore_index: int = -100
    label_smoothing: float = 0.0
