"""Focal loss (Lin et al. 2017) as a method; the loss is in losses/focal.py."""

from dataclasses import dataclass

from torch import Tensor

from fastadvisor import losses
from fastadvisor.config import NonNegative
from fastadvisor.loading.batch import Batch
from fastadvisor.methods.base import Method


class Focal(Method):
    """(1 − p_y)^γ times the cross-entropy, so that samples that are classified well count less."""

    @dataclass
    class Settings:
        """The setting of the exponent."""

        focal_gamma: NonNegative = 1.0
        """Exponent gamma; 0 is plain cross-entropy."""

    def sample_losses(self, z_BC: Tensor, batch: Batch) -> Tensor:
        """Return the focal losses (B,), in float32 or wider."""
        return losses.focal(z_BC, batch.labels, self.settings.focal_gamma)
