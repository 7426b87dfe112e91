"""What a classifier says of images: the one way to logits and features, with the ids of the images."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastadvisor.loading import Batch
from fastadvisor.models import SplitClassifier


class Predicted(NamedTuple):
    """Of a batch of B images, in C classes; on the device of the images, without a graph."""

    ids: Tensor
    """(B,) int64 sample numbers: rows of the part of the data set that the batches are of."""
    labels: Tensor
    """(B,) int64 labels that came with the images."""
    logits: Tensor
    """(B, C) float32."""
    features: Tensor | None
    """(B, D) float32, what enters the head; None of a model that is no :class:`SplitClassifier`."""


def predictions(
    model: nn.Module, batches: Iterable[Batch], execution: Callable[[], AbstractContextManager[None]]
) -> Iterator[Predicted]:
    """Run ``model`` in evaluation mode on ``batches``, one by one as they are asked for; then put it into the mode it was in.

    Args:
        model: (B, 3, H, W) → (B, C).
        batches: on the model's device.
        execution: makes the context of each pass, such as that of autocast (:class:`fastadvisor.runtime.execution.Execution`).
    """
    training = model.training
    model.eval()
    try:
        for batch in batches:
            # No context may be open while the caller works with what it gets: it would hold for the caller, too.
            with torch.no_grad(), execution(), _entering_head(model) as seen:
                logits = model(batch.images)
            yield Predicted(batch.ids, batch.labels, logits.float(), seen[0].float() if seen else None)
    finally:
        model.train(training)


@contextmanager
def _entering_head(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what enters the head of ``model`` inside the block."""
    seen: list[Tensor] = []
    if not isinstance(model, SplitClassifier):
        yield seen
        return
    handle = model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()
