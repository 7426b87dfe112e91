"""Classifier re-training (Kang et al. 2020): the backbone learns from all images, the head from class-balanced batches."""

from dataclasses import dataclass

from fastadvisor.config import Fraction, Positive
from fastadvisor.methods.base import Method
from fastadvisor.methods.stages import Stage


class CRT(Method):
    """Cross-entropy; then, with the backbone frozen, a new head on batches in which all classes are equally frequent."""

    @dataclass
    class Settings:
        """The second stage."""

        crt_fraction: Fraction = 0.1
        """Last part of the epochs, in which a new head is trained alone (10 of 100 epochs in the paper)."""
        crt_lr_factor: Positive = 1.0
        """Learning rate of that part, over --lr; its schedule begins anew."""

    def stages(self) -> tuple[Stage, ...]:
        """Return the two stages: the whole classifier, then a new head."""
        settings = self.settings
        head = Stage(
            fraction=settings.crt_fraction,
            lr_factor=settings.crt_lr_factor,
            sampler="class-aware",
            trains="head",
            reset_head=True,
        )
        return Stage(fraction=1 - settings.crt_fraction), head
