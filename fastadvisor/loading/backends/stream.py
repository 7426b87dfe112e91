"""The parts that all loaders of files share: batches by number, spares for bad images, state, time spent waiting."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastadvisor.datasets.paths import Ints
from fastadvisor.datasets.types import Triple
from fastadvisor.errors import UserError
from fastadvisor.loading.augment import Augmentation, normalize
from fastadvisor.loading.autoaugment import cutout
from fastadvisor.loading.batch import Batch
from fastadvisor.loading.decode import Unreadable
from fastadvisor.loading.order import Order, Spec, list_sequential_specs
from fastadvisor.loading.samplers import Sampler
from fastadvisor.loading.unreadable import BadImages

T = TypeVar("T")


class Decoded(NamedTuple):
    """A batch as a backend returns it."""

    images: Tensor
    """(B, S, S, 3) uint8, cropped (and mirrored, unless cropped by padding), or (B, 3, S, S) float32, normalised as well."""
    ids: Tensor
    """(B,) int64 sample ids; bad images are replaced by spares."""
    bad: dict[int, str]
    """The reason for each sample id whose image could not be read."""


class Backend(Protocol):
    """Makes batches from files before they are needed."""

    def decode(self, specs: Iterable[Spec]) -> Iterator[Decoded]:
        """Yield the batches of ``specs``, in order. A second call gives up what the first has begun."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what later batches depend on besides their specs, as of the last batch that was handed out."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make the next ``decode`` continue as the backend whose ``state_dict`` returned ``state`` would have."""
        ...

    def close(self) -> None:
        """End threads and processes."""
        ...


class StreamLoader:
    """An endless stream of augmented batches for training."""

    def __init__(
        self,
        backend: Backend,
        order: Order,
        labels: Tensor,
        *,
        bad: BadImages,
        augment: Augmentation | None,
        mean: Triple,
        std: Triple,
        hole: int,
        device: torch.device,
    ) -> None:
        """Set up.

        Args:
            backend: makes the batches.
            order: decides which samples a batch holds.
            labels: (N,) int64 by sample id, on ``device``.
            bad: counts the images that cannot be read.
            augment: augments the (B, S, S, 3) uint8 that the backend returns; None if the backend crops.
            mean: of each channel, for pixels scaled to 0..1.
            std: likewise, the standard deviation.
            hole: side in pixels of the square that Cutout removes; 0 for none.
            device: the device of the batches.
        """
        self.backend, self.order, self.labels, self.bad = backend, order, labels, bad
        self.augment, self.mean, self.std, self.hole, self.device = augment, mean, std, hole, device
        self.batch_size = order.batch_size
        self.waited = 0.0
        """Seconds that the training has spent waiting for this loader so far."""
        self._generator = torch.Generator(device).manual_seed(order.seed)
        self._host = torch.Generator().manual_seed(order.seed)
        self._index = 0
        self._decoded: Iterator[Decoded] | None = None

    def __len__(self) -> int:
        """Return the number of full batches in an epoch."""
        return len(self.order)

    def __iter__(self) -> "StreamLoader":
        return self

    def __next__(self) -> Batch:
        return self.next_batch()

    def next_batch(self) -> Batch:
        """Return the next batch.

        Raises:
            UserError: too many images cannot be read.
        """
        began = time.perf_counter()
        if self._decoded is None:
            self._decoded = self.backend.decode(self.order.specs(self._index))
        decoded = next(self._decoded)
        self.waited += time.perf_counter() - began
        self._index += 1
        self.bad.add(decoded.bad)
        if len(decoded.ids) < self.batch_size:
            raise UserError(
                f"Of a batch of {self.batch_size} {self.bad.part} images so many cannot be read that it cannot be filled "
                f"(first: {self.bad.images.name(next(iter(decoded.bad)))}): replace or delete them."
            )
        ids = decoded.ids.to(self.device, non_blocking=True)
        return Batch(self._finish(decoded.images.to(self.device, non_blocking=True)), self.labels[ids], ids)

    def _finish(self, images: Tensor) -> Tensor:
        if self.augment is not None:  # which mirrors, and applies AutoAugment and Cutout, too
            rows = torch.arange(len(images), device=self.device)
            return self.augment(images, rows, self._generator, self._host, self.order.share)
        if images.dtype == torch.uint8:
            images = normalize(images, self.mean, self.std)
        return cutout(images, self.hole, self._generator, self.order.share) if self.hole else images

    def use(self, sampler: Sampler, *, anew: bool) -> None:
        """Draw epochs with ``sampler`` from the next batch on; ``anew`` is not needed: a batch's number tells its epoch."""
        self.order.use(sampler)
        self._decoded = None  # batches that were decoded ahead were drawn by the last sampler

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream, as CPU tensors and plain values."""
        return {
            "index": self._index,
            "count": len(self.order.ids),
            "generator": self._generator.get_state(),
            "host": self._host.get_state(),
            "backend": self.backend.state_dict(),
            "share": list(self.order.share),
            "bad": dict(self.bad.reasons),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where the loader that wrote ``state`` stood, even in the middle of an epoch.

        Raises:
            UserError: the state is that of another loader or training set, or of another kind of device.
        """
        check_state(state, "index", len(self.order.ids))
        set_generator(self._generator, state["generator"])
        set_generator(self._host, state["host"])
        self._index, self._decoded = int(state["index"]), None
        self.bad.reasons = {int(row): str(reason) for row, reason in state["bad"].items()}
        if list(state["share"]) == list(self.order.share):  # else a backend with random numbers of its own starts anew
            self.backend.load_state_dict(state["backend"])

    def close(self) -> None:
        """End threads and processes."""
        self._decoded = None
        self.backend.close()


class EvaluationStream:
    """The test images in order, each once, without bad ones; rank r of R yields every R-th image, from number r on."""

    def __init__(
        self,
        backend: Backend,
        labels: Tensor,
        batch_size: int,
        *,
        bad: BadImages,
        mean: Triple,
        std: Triple,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """Take (N,) int64 ``labels`` on the device of the batches, and the size of every batch but the last."""
        self.backend, self.labels, self.batch_size, self.bad, self.mean, self.std = backend, labels, batch_size, bad, mean, std
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        """Return the number of images of all ranks, including bad ones."""
        return len(self.labels)

    def __iter__(self) -> Iterator[Batch]:
        device = self.labels.device
        for decoded in self.backend.decode(list_sequential_specs(len(self.labels), self.batch_size, self.rank, self.ranks)):
            self.bad.add(decoded.bad)
            if not len(decoded.ids):
                continue
            images, ids = decoded.images.to(device, non_blocking=True), decoded.ids.to(device, non_blocking=True)
            if images.dtype == torch.uint8:
                images = normalize(images, self.mean, self.std)
            yield Batch(images, self.labels[ids], ids)

    def close(self) -> None:
        """End threads and processes."""
        self.backend.close()


def make_samples(
    spec: Spec, attempt: Callable[[int, int], T], run: Callable[[Callable[[int], Any], Iterable[int]], Iterable[Any]] = map
) -> tuple[list[T], Ints, dict[int, str]]:
    """Make every sample of a batch; one that cannot be read is replaced by the next spare of the batch.

    Which spare it is depends on the files alone, not on what has been read before, so a resumed run makes the same batch.

    Args:
        spec: the batch.
        attempt: makes a sample, given its place in the batch and a sample id, or raises Unreadable.
        run: ``map``, or the ``map`` of an executor.

    Returns:
        The samples, their ids (int64), and the reason for each id that could not be read. If no spare is left, the batch is
        smaller.
    """

    def first(place: int) -> T | Unreadable:
        try:
            return attempt(place, int(spec.ids[place]))
        except Unreadable as reason:
            return reason

    made: list[T] = []
    ids: list[int] = []
    bad: dict[int, str] = {}
    spares = iter(spec.spares.tolist())
    for place, sample in enumerate(run(first, range(len(spec.ids)))):
        row = int(spec.ids[place])
        while isinstance(sample, Unreadable):
            bad[row] = str(sample)
            row = next(spares, -1)
            if row < 0:
                break
            try:
                sample = attempt(place, row)
            except Unreadable as reason:
                sample = reason
        else:
            made.append(sample)
            ids.append(row)
    return made, np.array(ids, dtype=np.int64), bad


def check_state(state: Mapping[str, Any], key: str, count: int) -> None:
    """Raise a UserError unless ``state`` is that of the same kind of loader and of a training set of ``count`` images."""
    if key not in state:
        raise UserError("The saved run used another loader: resume it with the --loader it was started with.")
    if "host" not in state:
        raise UserError("The saved run is of an earlier version of fastadvisor, which cannot be continued: start it anew.")
    saved = state["count"] if "count" in state else len(state["order"])
    if saved != count:
        raise UserError(
            f"The saved run drew from {saved} images, this one has {count}: "
            "continue it with the data settings it was started with."
        )


def set_generator(generator: torch.Generator, state: Tensor) -> None:
    """Set ``generator`` to ``state``; raise a UserError if ``state`` is that of another kind of device."""
    try:
        generator.set_state(state.cpu())
    except RuntimeError:  # CPU and CUDA have different generators
        raise UserError(
            "The saved run drew its batches on another kind of device: resume it with the --device it was started on."
        ) from None
