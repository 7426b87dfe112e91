"""Samplers: which samples an epoch holds, and in what order.

To add one, write a class with ``epoch`` and a line in ``SAMPLERS``; a stage of a method asks for it by its name.
"""

from typing import Protocol

import numpy as np

from fastadvisor.datasets.paths import Ints


class Sampler(Protocol):
    """Draws the samples of an epoch."""

    def epoch(self, ids: Ints, labels: Ints, rng: np.random.Generator) -> Ints:
        """Return (n,) int64 ids, in the order in which they are trained on.

        Args:
            ids: (n,) int64, the samples to draw from.
            labels: (n,) int64, their labels as given.
            rng: the generator of this epoch, which is in the same state on all ranks.
        """
        ...


class Shuffled:
    """Every sample once, in random order."""

    def epoch(self, ids: Ints, labels: Ints, rng: np.random.Generator) -> Ints:
        """Return a permutation of ``ids``."""
        return rng.permutation(ids)


class ClassAware:
    """Every class equally often: one sample of each class in each round, with the classes shuffled anew in every round.

    All samples of a class are drawn before one is drawn again (Shen et al. 2016; the second stage of Kang et al. 2020).
    """

    def epoch(self, ids: Ints, labels: Ints, rng: np.random.Generator) -> Ints:
        """Return (n,) ids, in which the samples of small classes occur several times."""
        present = np.unique(labels)
        classes = _repeat_shuffled(present, len(ids), rng)
        drawn = np.empty_like(ids)
        for label in present:
            places = np.flatnonzero(classes == label)
            drawn[places] = _repeat_shuffled(ids[labels == label], len(places), rng)
        return drawn


def _repeat_shuffled(values: Ints, count: int, rng: np.random.Generator) -> Ints:
    """Return ``count`` values: permutations of ``values``, one after another, the last one cut off."""
    turns = -(-count // len(values))
    return rng.permuted(np.tile(values, (turns, 1)), axis=1).reshape(-1)[:count]


SAMPLERS: dict[str, Sampler] = {"shuffled": Shuffled(), "class-aware": ClassAware()}
