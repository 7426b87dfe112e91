"""The protocols on label arrays, without any images: meta-set, long tail, label noise (method.md; paper 4.1).

Everything here is a pure function of its arguments: randomness comes from the generator that is passed in.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastadvisor.errors import UserError

Ints = NDArray[np.int64]

SEMANTIC = {"truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog", "dog": "cat"}
"""CIFAR-10's look-alikes; the other classes keep their labels (paper 4.1)."""


def draw_meta_set(
    labels: Ints,
    per_class: int,
    classes: Sequence[str],
    eligible: NDArray[np.bool_],
    rng: np.random.Generator,
    leave: int = 1,
) -> Ints:
    """Draw the balanced clean meta-set (paper 4.1), before anything else is done to the data set.

    Args:
        labels: (N,) the data set's own labels.
        per_class: images to draw from each class.
        classes: names, for messages.
        eligible: (N,) which images may be drawn.
        rng: drawn from once a class.
        leave: images of each class that must be left; 0 where they are drawn from a set of their own.

    Returns:
        (per_class * C,) sorted sample ids.

    Raises:
        UserError: a class that would be left without training images, or has too few eligible ones.
    """
    chosen = []
    for label, name in enumerate(classes):
        of_class = labels == label
        count, free = int(of_class.sum()), np.flatnonzero(of_class & eligible)
        if count < per_class and not leave:
            raise UserError(
                f"Class {name!r} has {count} images to draw the meta-set from, "
                f"fewer than --meta-per-class {per_class}: lower it."
            )
        if count < per_class + leave:
            raise UserError(
                f"Class {name!r} has {count} training images and --meta-per-class {per_class} leaves none to train on: "
                "lower it, or give the class more images."
            )
        if len(free) < per_class:
            raise UserError(
                f"Class {name!r} has only {len(free)} images without an identical copy among the training images, "
                f"fewer than --meta-per-class {per_class}: lower it, or remove the copies."
            )
        chosen.append(rng.permutation(free)[:per_class])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def long_tail_counts(n_max: int, classes: int, imbalance_factor: float) -> list[int]:
    """Return the class sizes of the exponential profile, n_max * (1/IF)^(i/(C-1)) rounded down (Cui et al. 2019)."""
    return [int(n_max * (1 / imbalance_factor) ** (i / max(1, classes - 1))) for i in range(classes)]


def long_tail_profile(available: Sequence[int], imbalance_factor: float) -> list[int]:
    """Return the class sizes of the exponential profile for classes that have ``available`` images.

    n_max is the mean of ``available`` (method.md). Where a class cannot fill its place by more than a tenth, as in
    Clothing1M, n_max is lowered until all can: the factor stays what was asked for.
    """
    counts = long_tail_counts(sum(available) // len(available), len(available), imbalance_factor)
    if all(has >= 0.9 * wanted for has, wanted in zip(available, counts, strict=True)):
        return counts
    last = max(1, len(available) - 1)
    n_max = min(int(has * imbalance_factor ** (i / last)) for i, has in enumerate(available))
    return long_tail_counts(n_max, len(available), imbalance_factor)


def cut_long_tail(labels: Ints, ids: Ints, counts: Sequence[int], rng: np.random.Generator) -> Ints:
    """Keep at most ``counts[i]`` of the images of class i, at random.

    Args:
        labels: (N,) by sample id, what the tail is cut by.
        ids: (n,) the samples there are to choose from.
        counts: (C,) class sizes.
        rng: each class is shuffled in full, so that a longer tail is a subset of a shorter one.

    Returns:
        (k,) sorted sample ids.
    """
    kept = [rng.permutation(ids[labels[ids] == label])[:count] for label, count in enumerate(counts)]
    return np.sort(np.concatenate(kept)).astype(np.int64)


def flip_map(classes: int, seed: int = 1) -> list[int]:
    """Return for each class the one its labels flip to: the map of MW-Net's published code (``flip_labels_C``).

    It is the customary one, hence numpy's legacy generator; a private one, the global state is left alone.

    Raises:
        UserError: fewer than two classes.
    """
    return [int(target[0]) for target in _customary_targets(classes, 1, seed)]


def flip2_map(classes: int, seed: int = 1) -> list[tuple[int, int]]:
    """Return for each class the two its labels flip to (MW-Net's ``flip_labels_C_two``).

    Raises:
        UserError: fewer than three classes.
    """
    return [(int(target[0]), int(target[1])) for target in _customary_targets(classes, 2, seed)]


def _customary_targets(classes: int, targets: int, seed: int) -> list[Ints]:
    if classes <= targets:
        kind = "flip" if targets == 1 else "flip2"
        raise UserError(f"--noise {kind} needs {targets + 1} classes or more, the data set has {classes}.")
    random, every = np.random.RandomState(seed), np.arange(classes)
    if targets == 1:  # the published calls, argument for argument: the stream depends on them
        return [np.atleast_1d(random.choice(every[every != i])) for i in range(classes)]
    return [random.choice(every[every != i], 2, replace=False) for i in range(classes)]


def check_flip_map(given: Sequence[int], classes: Sequence[str]) -> list[int]:
    """Return the user's own flip map if it names a class for each class.

    Raises:
        UserError: wrong length, or an entry that is no class number.
    """
    if len(given) != len(classes):
        raise UserError(f"flip_map has {len(given)} entries, the data set {len(classes)} classes: give one per class.")
    for label, target in enumerate(given):
        if not 0 <= target < len(classes):
            raise UserError(f"flip_map sends class {label} to {target}, which is no class: use 0 to {len(classes) - 1}.")
    return list(given)


def noise_targets(
    kind: str,
    classes: Sequence[str],
    given_map: Sequence[int] | None = None,
    superclasses: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """Return for each class the equally likely classes that a corrupted label of it turns into (paper 4.1).

    ``uniform`` draws over all classes, the own one included, as in Zhang et al. 2017; ``hierarchical`` over the other
    classes of the same superclass.

    Raises:
        UserError: the data set does not suit the kind, or a bad ``given_map``.
    """
    count = len(classes)
    if kind == "flip":
        return [[target] for target in (flip_map(count) if given_map is None else check_flip_map(given_map, classes))]
    if kind == "flip2":
        return [list(pair) for pair in flip2_map(count)]
    if kind == "uniform":
        return [list(range(count)) for _ in classes]
    if kind == "semantic":
        return _semantic_targets(classes)
    if kind == "hierarchical":
        return _hierarchical_targets(count, superclasses)
    raise UserError(f"No noise {kind!r}: choose flip, flip2, semantic, uniform or hierarchical.")


def _semantic_targets(classes: Sequence[str]) -> list[list[int]]:
    missing = sorted({name for pair in SEMANTIC.items() for name in pair} - set(classes))
    if missing:
        raise UserError(
            f"--noise semantic swaps classes of CIFAR-10 by name and the data set has no {missing[0]!r}: "
            "choose another --noise, such as flip."
        )
    return [[classes.index(SEMANTIC.get(name, name))] for name in classes]


def _hierarchical_targets(count: int, superclasses: Sequence[Sequence[int]] | None) -> list[list[int]]:
    if superclasses is None:
        raise UserError(
            "--noise hierarchical needs superclasses, which only cifar100 has: choose another --noise, such as flip."
        )
    targets = [[label] for label in range(count)]  # a class alone in its group has nowhere to go
    for group in superclasses:
        for label in group:
            targets[label] = [other for other in group if other != label] or [label]
    return targets


def corrupt(labels: Ints, targets: Sequence[Sequence[int]], rate: float, rng: np.random.Generator) -> Ints:
    """Return a copy of ``labels`` in which each label is, independently with probability ``rate``, redrawn.

    Args:
        labels: (N,) true labels.
        targets: per class, the equally likely classes it turns into.
        rate: probability.
        rng: the draws depend on N alone, so a sample's fate depends neither on which others are in the training set
            nor on the kind, and what is corrupted at a low rate is corrupted at a higher one.
    """
    hit, which = rng.random(len(labels)) < rate, rng.random(len(labels))
    noisy = labels.copy()
    for label, choices in enumerate(targets):
        rows = np.flatnonzero(hit & (labels == label))
        noisy[rows] = np.asarray(choices, dtype=np.int64)[(which[rows] * len(choices)).astype(np.int64)]
    return noisy
