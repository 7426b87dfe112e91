"""The contracts between data sets and the rest: what a data set is as it lies on disk, and after the protocols."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastadvisor.datasets.images import Images
from fastadvisor.datasets.paths import Ints

Triple = tuple[float, float, float]


@dataclass
class Split:
    """Images and their labels."""

    images: Images
    labels: Tensor
    """(N,) int64."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class Source:
    """A data set as it lies on disk, before the protocols; reading one opens no image."""

    name: str
    classes: list[str]
    train: Split
    """In data-set order: the row is the sample id."""
    test: Split
    mean: Triple
    """Per channel, in units of 0..1."""
    std: Triple
    meta: Split | None = None
    """A meta-set of its own, if the data set brings one."""
    meta_drawn: bool = False
    """Whether ``meta_per_class`` images a class are drawn from ``meta``, as for ImageNet-LT; else all of it is taken."""
    image_size: int | None = None
    """Side in pixels the data set is used at; None: to be chosen from the images."""
    superclasses: list[list[int]] | None = None
    """Groups of classes, for hierarchical noise."""
    val: Split | None = None
    """Images to choose the best checkpoint by, where the data set has them beside its test images."""
    meta_rows: Ints | None = None
    """(M,) for each meta image its row among the training images, -1 where it is none of them; None: no meta image is. Those
    that are become the meta-set, with the labels they have there, and are trained on no more."""
    notes: tuple[str, ...] = ()
    """Sentences that a user is to be told: what was passed over, what was decided."""

    def reorder_classes(self, classes: list[str]) -> "Source":
        """Return the source with its classes in the order of ``classes``, which are the same ones."""
        if classes == self.classes:
            return self
        places = torch.tensor([classes.index(name) for name in self.classes])

        def moved(split: Split | None) -> Split | None:
            if split is None:
                return None
            known = (split.labels >= 0) & (split.labels < len(classes))  # others are refused where all labels are looked at
            labels = split.labels.clone()
            labels[known] = places[labels[known]]
            return Split(split.images, labels)

        groups = self.superclasses
        train, test = moved(self.train), moved(self.test)
        assert train is not None
        assert test is not None
        return replace(
            self,
            classes=list(classes),
            train=train,
            test=test,
            meta=moved(self.meta),
            val=moved(self.val),
            superclasses=None if groups is None else [[int(places[label]) for label in group] for group in groups],
        )


@dataclass
class TrainingData:
    """A data set after the protocols: meta-set out, long tail cut, labels corrupted."""

    name: str
    classes: list[str]
    images: Images
    """N images, every one the run may train on; row = sample id."""
    labels: Tensor
    """(N,) int64 by sample id: what the run believes; corruption edits this table and nothing else."""
    true_labels: Tensor
    """(N,) int64 by sample id: the labels before injected noise."""
    train_ids: Tensor
    """(n,) int64."""
    meta_ids: Tensor
    """(m,) int64, disjoint from ``train_ids``."""
    test: Split
    mean: Triple
    std: Triple
    image_size: int | None = None
    """As in :class:`Source`, or what the user asked for."""
    val: Split | None = None
    """As in :class:`Source`."""
    notes: tuple[str, ...] = ()
    """As in :class:`Source`, and what the protocols add."""
    meta_held_out: bool = True
    """Whether the meta-set was taken out of the training images, its labels believed; else the data set brought its own."""

    def label_counts(self) -> Tensor:
        """Training images per class, (C,) int64, by the label as given: what a method may know."""
        return torch.bincount(self.labels[self.train_ids], minlength=len(self.classes))

    def true_class_counts(self) -> Tensor:
        """Training images per class, (C,) int64, by the label before injected noise."""
        return torch.bincount(self.true_labels[self.train_ids], minlength=len(self.classes))

    def noise_rate(self) -> float:
        """Fraction of training labels that corruption changed."""
        given, true = self.labels[self.train_ids], self.true_labels[self.train_ids]
        return float((given != true).double().mean())
