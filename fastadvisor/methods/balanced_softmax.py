"""Balanced softmax (Ren et al. 2020) as a method; the loss is in losses/balanced_softmax.py."""

from typing import Any, ClassVar

from torch import Tensor

from fastadvisor import losses
from fastadvisor.loading.batch import Batch
from fastadvisor.methods.base import DataFacts, Method


class BalancedSoftmax(Method):
    """Cross-entropy of z + log n, where n counts the labels as given; at test time the logits are z."""

    needs: ClassVar[tuple[str, ...]] = ("label_counts",)
    counts: Tensor
    """n (C,) int64."""

    def __init__(self, settings: Any, features: int, facts: DataFacts) -> None:
        super().__init__(settings, features, facts)
        self.register_buffer("counts", facts.label_counts, persistent=False)

    def sample_losses(self, z_BC: Tensor, batch: Batch) -> Tensor:
        """Return the balanced softmax losses (B,), in float32 or wider."""
        return losses.balanced_softmax(z_BC, batch.labels, self.counts)
