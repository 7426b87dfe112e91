"""The batch that every loader yields."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """The images, labels and sample ids of a batch."""

    images: Tensor
    """(B, 3, H, W) float32, augmented and normalised, on the training device."""
    labels: Tensor
    """(B,) int64."""
    ids: Tensor
    """(B,) int64 sample ids: rows of ``TrainingData.images`` and ``TrainingData.labels``, the same in every epoch."""

    def split(self, parts: int) -> list["Batch"]:
        """Return the batch as ``parts`` batches of equal size; ``parts`` must divide the batch size."""
        pieces = zip(*(tensor.chunk(parts) for tensor in self), strict=True)
        return [self] if parts == 1 else [Batch(*piece) for piece in pieces]
