"""Which samples a batch holds and how each is cropped: a pure function of the seed and the batch's number.

So a loader's whole state is a number, two loaders of one seed give the same batches, and N ranks with batch B/N see
together exactly what one rank with batch B sees.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from fastadvisor.datasets.paths import Ints
from fastadvisor.loading.geometry import DRAWS, Draws
from fastadvisor.loading.samplers import SAMPLERS, Sampler
from fastadvisor.runtime.share import Share

SPARES = 32
"""Samples that stand in, in this order, for those of a batch that cannot be read."""


class Spec(NamedTuple):
    """What a batch is to be made of."""

    number: int
    """Number of the batch, counted from the start of the run."""
    ids: Ints
    """(B,)"""
    draws: Draws | None
    """(B, DRAWS) uniform in [0, 1); None in testing."""
    spares: Ints
    """(SPARES,) ids, or none in testing."""


class Order:
    """An endless sequence of batches; every epoch a new order, of all samples once unless another sampler is used, and the last
    partial batch dropped.
    """

    def __init__(
        self, ids: Ints, batch_size: int, seed: int, rank: int = 0, ranks: int = 1, labels: Ints | None = None
    ) -> None:
        """Set up.

        Args:
            ids: (n,) the samples to draw from.
            batch_size: samples of this rank in a batch.
            seed: of the order and the crops.
            rank: of this process, 0 to ``ranks`` - 1: it sees the ``rank``-th part of each batch of all ranks.
            ranks: processes that share an epoch.
            labels: (n,) of the samples, for samplers that go by them.
        """
        self.labels = np.zeros_like(ids) if labels is None else labels
        self.sampler: Sampler = SAMPLERS["shuffled"]
        self.ids, self.batch_size, self.seed, self.share = ids, batch_size, seed, Share(rank, ranks)
        self._epoch, self._order = -1, ids

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.ids) // self.share.whole(self.batch_size)

    def use(self, sampler: Sampler) -> None:
        """Draw epochs by ``sampler``."""
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
        """Return the batches from number ``start`` on, without end."""
        while True:
            yield self.spec(start)
            start += 1


def list_sequential_specs(count: int, batch_size: int, rank: int = 0, ranks: int = 1) -> list[Spec]:
    """Return the batches that cover every ``ranks``-th of rows 0 to ``count`` - 1, from ``rank`` on, once and in order; the
    last may be smaller.
    """
    none = np.empty(0, dtype=np.int64)
    rows = np.arange(rank, count, ranks)
    starts = range(0, len(rows), batch_size)
    return [Spec(number, rows[start : start + batch_size], None, none) for number, start in enumerate(starts)]
