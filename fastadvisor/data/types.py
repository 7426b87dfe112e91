"""The contracts between data and the rest: what a data set is, and what a batch is."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """What every loader yields."""

    images: Tensor
    """(B, 3, H, W) float32, augmented and normalised, on the training device."""
    labels: Tensor
    """(B,) int64."""
    ids: Tensor
    """(B,) int64 stable sample numbers: rows of ``TrainingData.images`` and ``TrainingData.labels``."""


@dataclass
class Source:
    """A data set as it lies on disk, before the protocols."""

    name: str
    classes: list[str]
    images: Tensor
    """(N, H, W, 3) uint8, the training images in data-set order."""
    labels: Tensor
    """(N,) int64."""
    test_images: Tensor
    test_labels: Tensor
    mean: tuple[float, float, float]
    """Per channel, in units of 0..1."""
    std: tuple[float, float, float]
    meta_images: Tensor | None = None
    """A meta-set of its own, if the data set brings one."""
    meta_labels: Tensor | None = None
    superclasses: list[list[int]] | None = None
    """Groups of classes, for hierarchical noise."""
    paths: list[str] = field(default_factory=list)
    """File of each training image, where there are files (else empty), for messages."""
    meta_paths: list[str] = field(default_factory=list)


@dataclass
class TrainingData:
    """A data set after the protocols: meta-set out, long tail cut, labels corrupted."""

    name: str
    classes: list[str]
    images: Tensor
    """(N, H, W, 3) uint8: every image the run may touch; row = sample id."""
    labels: Tensor
    """(N,) int64 by sample id: what the run believes; corruption edits this table and nothing else."""
    true_labels: Tensor
    """(N,) int64 by sample id: the labels before injected noise."""
    train_ids: Tensor
    """(n,) int64."""
    meta_ids: Tensor
    """(m,) int64, disjoint from ``train_ids``."""
    test_images: Tensor
    test_labels: Tensor
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    meta_held_out: bool = True
    """Whether the meta-set was taken out of the training images, its labels believed; else the data set brought its own."""

    def class_counts(self) -> Tensor:
        """Training images per class, (C,) int64, by the label before injected noise."""
        return torch.bincount(self.true_labels[self.train_ids], minlength=len(self.classes))

    def noise_rate(self) -> float:
        """Fraction of training labels that corruption changed."""
        given, true = self.labels[self.train_ids], self.true_labels[self.train_ids]
        return float((given != true).double().mean())
