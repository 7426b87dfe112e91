"""Accuracy of a classifier: top-1, top-5, per class, and for many-, medium- and few-shot classes."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastadvisor.datasets import TrainingData
from fastadvisor.errors import UserError
from fastadvisor.loading import Batch
from fastadvisor.runtime.ranks import ALONE, Ranks
from fastadvisor.training.predictions import predictions

MANY, FEW = 100, 20
"""Many-shot: more than 100 training images; few-shot: fewer than 20; medium between (ImageNet-LT's convention)."""


@dataclass
class Accuracy:
    """In percent of the test images."""

    top1: float
    top5: float
    """Among the five largest logits (all of them where there are fewer classes)."""
    per_class_top1: list[float | None]
    """By class, None where a class has no test images."""
    many_medium_few: dict[str, float | None]
    """Mean of per-class accuracies over the classes with many, medium and few training images; None of no classes."""


def accuracy(
    model: nn.Module,
    test: Iterable[Batch],
    data: TrainingData,
    *,
    precision: Callable[[], AbstractContextManager[None]],
    ranks: Ranks = ALONE,
) -> Accuracy:
    """Test ``model`` in evaluation mode, and leave it in the mode it was in.

    Args:
        model: (B, 3, H, W) → (B, C).
        test: this rank's test images in batches, each once, on the model's device.
        data: for the classes and their training images.
        precision: makes the autocast context.
        ranks: who share the test images; all of them get the accuracy on all images.

    Raises:
        UserError: there are no images to test on that can be read.
    """
    classes = len(data.classes)
    # Images, hits and hits among five by class, counted on the device: whole numbers, so the ranks' sums are exact.
    counts = torch.zeros(3, classes, dtype=torch.int64, device=data.labels.device)
    with torch.inference_mode():
        for _, labels, logits, _ in predictions(model, test, precision):
            best = logits.topk(min(5, classes), dim=1).indices
            hit = best == labels[:, None]
            of_batch = torch.stack([torch.ones_like(labels), hit[:, 0].long(), hit.any(dim=1).long()])
            counts = counts.to(labels.device).scatter_add(1, labels.expand(3, -1), of_batch)
    total, first, five = ranks.total(counts.clone()).tolist()
    per_class = [100 * hits / images if images else None for hits, images in zip(first, total, strict=True)]
    groups = many_medium_few(per_class, data.true_class_counts())
    images = sum(total)
    if not images:
        raise UserError("None of the images to test on can be read: replace them (the run's bad_images.csv lists them).")
    return Accuracy(100 * sum(first) / images, 100 * sum(five) / images, per_class, groups)


def many_medium_few(per_class: list[float | None], counts: Tensor) -> dict[str, float | None]:
    """Average per-class accuracies over the classes with > 100, 20 to 100, and < 20 training images."""
    groups: dict[str, list[float]] = {"many": [], "medium": [], "few": []}
    for value, count in zip(per_class, counts.tolist(), strict=True):
        if value is not None:
            groups["many" if count > MANY else "few" if count < FEW else "medium"].append(value)
    return {name: sum(values) / len(values) if values else None for name, values in groups.items()}
