"""The protocols as functions of label arrays alone: meta-set, long tail, label noise (method.md; paper 4.1).

Every function here is pure: all randomness comes from the generator that is passed in.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastadvisor.errors import UserError

Ints = NDArray[np.int64]

SEMANTIC = {"truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog", "dog": "cat"}
"""The class of CIFAR-10 that each of these classes is mistaken for; the other classes keep their labels (paper 4.1)."""


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
        labels: (N,) int64, the data set's own labels.
        per_class: number of images to draw from each class.
        classes: C names, for messages.
        eligible: (N,) bool, which images may be drawn.
        rng: used once for each class, in order.
        leave: number of images of each class that must remain; 0 if the meta-set is drawn from a set that is not trained on.

    Returns:
        (per_class * C,) int64: the sample ids, sorted.

    Raises:
        UserError: a class has too few images or too few eligible ones, or would be left without training images.
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

    n_max is the mean of ``available``, rounded down (method.md). If a class has less than nine tenths of the images that the
    profile wants of it, as in Clothing1M, n_max is lowered until every class has enough; the imbalance factor is kept.
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
        labels: (N,) int64 by sample id, the labels that decide which class an image is counted in.
        ids: (n,) int64, the samples to choose from.
        counts: C class sizes.
        rng: shuffles each class in full, so that the images of a higher imbalance factor are a subset of those of a lower one.

    Returns:
        (k,) int64: the sample ids that are kept, sorted.
    """
    kept = [rng.permutation(ids[labels[ids] == label])[:count] for label, count in enumerate(counts)]
    return np.sort(np.concatenate(kept)).astype(np.int64)


def flip_map(classes: int, seed: int = 1) -> list[int]:
    """Return for each class the class that its corrupted labels turn into, as in MW-Net's code (``flip_labels_C``).

    Papers compare on exactly this map, so it is drawn with numpy's legacy generator, as there. The generator is a private one:
    numpy's global state is not touched.

    Raises:
        UserError: fewer than two classes.
    """
    return [int(target[0]) for target in _customary_targets(classes, 1, seed)]


def flip2_map(classes: int, seed: int = 1) -> list[tuple[int, int]]:
    """Return for each class the two classes that its corrupted labels turn into (MW-Net's ``flip_labels_C_two``).

    Raises:
        UserError: fewer than three classes.
    """
    return [(int(target[0]), int(target[1])) for target in _customary_targets(classes, 2, seed)]


def _customary_targets(classes: int, targets: int, seed: int) -> list[Ints]:
    if classes <= targets:
        kind = "flip" if targets == 1 else "flip2"
        raise UserError(f"--noise {kind} needs {targets + 1} classes or more, the data set has {classes}.")
    random, every = np.random.RandomState(seed), np.arange(classes)
    if targets == 1:  # exactly the published calls: the random numbers depend on them
        return [np.atleast_1d(random.choice(every[every != i])) for i in range(classes)]
    return [random.choice(every[every != i], 2, replace=False) for i in range(classes)]


def check_flip_map(given: Sequence[int], classes: Sequence[str]) -> list[int]:
    """Return the user's own flip map, checked to name a valid class for each class.

    Raises:
        UserError: it has the wrong length, or an entry is not a class number.
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
    """Return for each class the classes that a corrupted label of it turns into, each with equal probability (paper 4.1).

    ``uniform`` draws from all classes, the original one included, as in Zhang et al. 2017. ``hierarchical`` draws from the
    other classes of the same superclass.

    Raises:
        UserError: the kind is unknown or does not suit the data set, or ``given_map`` is not valid.
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
    targets = [[label] for label in range(count)]  # a class that is alone in its superclass keeps its labels
    for group in superclasses:
        for label in group:
            targets[label] = [other for other in group if other != label] or [label]
    return targets


def corrupt(labels: Ints, targets: Sequence[Sequence[int]], rate: float, rng: np.random.Generator) -> Ints:
    """Return a copy of ``labels`` in which each label is redrawn independently with probability ``rate``.

    Args:
        labels: (N,) int64, the true labels.
        targets: for each class, the classes that a redrawn label turns into, each with equal probability.
        rate: probability in [0, 1].
        rng: how many numbers are drawn depends on N alone. Which samples are hit therefore depends neither on the other samples
            of the training set nor on the kind of noise, and a sample that is hit at a low rate is hit at every higher one.
    """
    hit, which = rng.random(len(labels)) < rate, rng.random(len(labels))
    noisy = labels.copy()
    for label, choices in enumerate(targets):
        rows = np.flatnonzero(hit & (labels == label))
        noisy[rows] = np.asarray(choices, dtype=np.int64)[(which[rows] * len(choices)).astype(np.int64)]
    return noisy
