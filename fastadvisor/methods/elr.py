"""Early-learning regularisation (Liu et al. 2020) as a method; the loss is in losses/early_learning.py."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastadvisor import losses
from fastadvisor.config import Fraction, NonNegative
from fastadvisor.loading.batch import Batch
from fastadvisor.methods.base import DataFacts, Method


class ELR(Method):
    """Cross-entropy + λ log(1 − ⟨t_i, p_i⟩), where t_i is a moving average of the predictions for sample i."""

    @dataclass
    class Settings:
        """The settings of the moving average, and the weight of the regularisation."""

        elr_momentum: Fraction = 0.7
        """Weight of the old predictions in the moving average (CIFAR-10 0.7, CIFAR-100 0.9)."""
        elr_weight: NonNegative = 3.0
        """Weight lambda of the regularisation (CIFAR-10 3, CIFAR-100 7)."""

    needs: ClassVar[tuple[str, ...]] = ("samples",)
    targets: Tensor
    """t (N, C) float32, by sample id; takes 4 N C bytes of device memory."""

    def __init__(self, settings: Settings, features: int, facts: DataFacts) -> None:
        super().__init__(settings, features, facts)
        self.register_buffer("targets", torch.zeros(facts.samples, facts.classes))

    def observe(self, z_BC: Tensor, batch: Batch) -> None:
        """Update the moving averages of the batch's samples."""
        self.targets[batch.ids] = losses.updated_targets(self.targets[batch.ids], z_BC, self.settings.elr_momentum)

    def sample_losses(self, z_BC: Tensor, batch: Batch) -> Tensor:
        """Return the regularised losses (B,), in float32 or wider."""
        return losses.early_learning(z_BC, batch.labels, self.targets[batch.ids], self.settings.elr_weight)
