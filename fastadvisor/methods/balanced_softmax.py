"""Balanced softmax (Ren et al. 2020)."""

from typing import Any, ClassVar

from torch import Tensor

from fastadvisor import losses
from fastadvisor.loading.batch import Batch
from fastadvisor.methods.base import DataFacts, Method


class BalancedSoftmax(Method):
    """Cross-entropy of z + log n, n the counts of the labels as given; tested are the logits z."""

    needs: ClassVar[tuple[str, ...]] = ("label_counts",)
    counts: Tensor

    def __init__(self, settings: Any, features: int, facts: DataFacts) -> None:
        super().__init__(settings, features, facts)
        self.register_buffer("counts", facts.label_counts, persistent=False)

    def sample_losses(self, z_BC: Tensor, batch: Batch) -> Tensor:
        """Return the losses (B,)."""
        return losses.balanced_softmax(z_BC, batch.labels, self.counts)
