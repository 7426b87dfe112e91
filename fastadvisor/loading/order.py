"""Which samples a batch holds and how each is cropped: a pure function of the seed and the number of the batch.

The whole state of a loader is therefore one number, two loaders with the same seed give the same batches, and N ranks with a
batch size of B/N see together exactly what one rank with a batch size of B sees.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from fastadvisor.datasets.paths import Ints
from fastadvisor.loading.geometry import DRAWS, Draws
from fastadvisor.loading.samplers import SAMPLERS, Sampler
from fastadvisor.runtime.share import Share

SPARES = 32
"""Number of spare samples of a batch, which replace, in order, those that cannot be read."""


class Spec(NamedTuple):
    """The samples of a batch, and the random numbers by which they are cropped."""

    number: int
    """Number of the batch, counted from the start of the run."""
    ids: Ints
    """(B,) int64 sample ids."""
    draws: Draws | None
    """(B, DRAWS) float64, uniform in [0, 1); None for testing."""
    spares: Ints
    """(SPARES,) int64 sample ids that replace images that cannot be read; empty for testing."""


class Order:
    """An endless sequence of batches. The sampler draws every epoch anew; the last, partial batch of an epoch is dropped."""

    def __init__(
        self, ids: Ints, batch_size: int, seed: int, rank: int = 0, ranks: int = 1, labels: Ints | None = None
    ) -> None:
        """Set up.

        Args:
            ids: (n,) int64, the samples to draw from.
            batch_size: number of samples of this rank in a batch.
            seed: the seed of the order and of the crops.
            rank: number of this process, 0 to ``ranks`` - 1: it sees the ``rank``-th part of each batch of all ranks.
            ranks: number of processes that share an epoch.
            labels: (n,) int64, the labels as given of the samples, for samplers that use them.
        """
        self.labels = np.zeros_like(ids) if labels is None else labels
        self.sampler: Sampler = SAMPLERS["shuffled"]
        self.ids, self.batch_size, self.seed, self.share = ids, batch_size, seed, Share(rank, ranks)
        self._epoch, self._order = -1, ids

    def __len__(self) -> int:
        """Return the number of full batches in an epoch."""
        return len(self.ids) // self.share.whole(self.batch_size)

    def use(self, sampler: Sampler) -> None:
        """Draw epochs with ``sampler``, the one that is under way included."""
        self.sampler, self._epoch = sampler, -1

    def spec(self, number: int) -> Spec:
        """Return batch ``number``, counted from the start of the run."""
        epoch, position = divmod(number, len(self))
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._epoch, self._order = epoch, self.sampler.epoch(self.ids, self.labels, rng)
        whole, mine = self.share.whole(self.batch_size), self.share.part(self.batch_size)
        random = np.random.default_rng([self.seed, epoch, position])
        draws = random.random((whole, DRAWS))[mine]
        spares = self._order[random.integers(len(self.ids), size=SPARES)]
        return Spec(number, self._order[position * whole : (position + 1) * whole][mine], draws, spares)

    def specs(self, start: int) -> Iterator[Spec]:
        """Yield the batches from number ``start`` on, without end."""
        while True:
            yield self.spec(start)
            start += 1


def list_sequential_specs(count: int, batch_size: int, rank: int = 0, ranks: int = 1) -> list[Spec]:
    """Return the batches that cover the rows ``rank``, ``rank`` + ``ranks``, ... below ``count`` once, in order.

    The last batch may be smaller than ``batch_size``.
    """
    none = np.empty(0, dtype=np.int64)
    rows = np.arange(rank, count, ranks)
    starts = range(0, len(rows), batch_size)
    return [Spec(number, rows[start : start + batch_size], None, none) for number, start in enumerate(starts)]
