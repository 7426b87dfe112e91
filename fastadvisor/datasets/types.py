"""The types of a data set: as it is read from disk (``Source``), and after the protocols (``TrainingData``)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastadvisor.datasets.images import Images
from fastadvisor.datasets.paths import Ints

Triple = tuple[float, float, float]


@dataclass
class Split:
    """Images and their labels, in the same order."""

    images: Images
    labels: Tensor
    """(N,) int64, class numbers from 0."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class Source:
    """A data set as it is on disk, before the protocols. Reading one opens no image."""

    name: str
    classes: list[str]
    train: Split
    """In the order of the data set: the row is the sample id."""
    test: Split
    mean: Triple
    """Mean of each channel (R, G, B), for pixels scaled to 0..1."""
    std: Triple
    """Standard deviation of each channel, likewise."""
    meta: Split | None = None
    """The meta-set that the data set brings, if it brings one."""
    meta_drawn: bool = False
    """Whether ``meta_per_class`` images of each class are drawn from ``meta``, as for ImageNet-LT; otherwise all are used."""
    image_size: int | None = None
    """Side in pixels that the images are used at; None: it is chosen from the sizes of the images."""
    superclasses: list[list[int]] | None = None
    """Class numbers of each superclass, for hierarchical noise."""
    val: Split | None = None
    """Images by which the best checkpoint is chosen, if the data set has them besides its test images."""
    meta_rows: Ints | None = None
    """(M,) int64: for each meta image its row among the training images, -1 if it is not one of them; None: none of them is.
    Training images that are meta images leave the training set and have the labels that the meta-set gives them."""
    notes: tuple[str, ...] = ()
    """Sentences for the user: which files were passed over, and what was decided."""

    def reorder_classes(self, classes: list[str]) -> "Source":
        """Return the source with its class numbers changed to the order of ``classes``, which holds the same names."""
        if classes == self.classes:
            return self
        places = torch.tensor([classes.index(name) for name in self.classes])

        def moved(split: Split | None) -> Split | None:
            if split is None:
                return None
            known = (split.labels >= 0) & (split.labels < len(classes))  # labels out of range are refused by prepare
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
    """A data set after the protocols: with a meta-set, a long tail, and corrupted labels, as the settings ask."""

    name: str
    classes: list[str]
    images: Images
    """N images: all training and meta images; the row is the sample id."""
    labels: Tensor
    """(N,) int64 by sample id: the labels as given. Corruption changes this table and nothing else."""
    true_labels: Tensor
    """(N,) int64 by sample id: the labels before injected noise."""
    train_ids: Tensor
    """(n,) int64: the samples to train on."""
    meta_ids: Tensor
    """(m,) int64: the meta-set, disjoint from ``train_ids``."""
    test: Split
    mean: Triple
    std: Triple
    image_size: int | None = None
    """As in :class:`Source`, or what the user asked for."""
    val: Split | None = None
    """As in :class:`Source`."""
    notes: tuple[str, ...] = ()
    """As in :class:`Source`, followed by those of the protocols."""
    meta_held_out: bool = True
    """Whether the meta-set was drawn from the training images and trusts their labels; otherwise the data set brought it."""

    def label_counts(self) -> Tensor:
        """Return the number of training images of each class by the labels as given, (C,) int64: what a method may know."""
        return torch.bincount(self.labels[self.train_ids], minlength=len(self.classes))

    def true_class_counts(self) -> Tensor:
        """Return the number of training images of each class by the true labels, (C,) int64: for measuring only."""
        return torch.bincount(self.true_labels[self.train_ids], minlength=len(self.classes))

    def noise_rate(self) -> float:
        """Return the fraction of training labels that corruption changed."""
        given, true = self.labels[self.train_ids], self.true_labels[self.train_ids]
        return float((given != true).double().mean())
