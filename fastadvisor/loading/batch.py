"""What every loader yields."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """What every loader yields."""

    images: Tensor
    """(B, 3, H, W) float32, augmented and normalised, on the training device."""
    labels: Tensor
    """(B,) int64."""
    ids: Tensor
    """(B,) int64 stable sample numbers: rows of ``TrainingData.images`` and ``TrainingData.labels``."""

    def split(self, parts: int) -> list["Batch"]:
        """Return the batch in so many equal parts, which must divide it."""
        pieces = zip(*(tensor.chunk(parts) for tensor in self), strict=True)
        return [self] if parts == 1 else [Batch(*piece) for piece in pieces]
