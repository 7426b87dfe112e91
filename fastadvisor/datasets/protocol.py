"""Turn a source into training data: draw the meta-set, cut the long tail, corrupt the labels, in this order (method.md).

The order matters: if the meta-set were drawn last, or from a second shuffle, meta images would leak into training (design.md,
trap 11). Each of these protocols has a random generator of its own, so the meta-set does not depend on the noise.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastadvisor.config import DataConfig
from fastadvisor.datasets.corruption import Ints, corrupt, cut_long_tail, draw_meta_set, long_tail_profile, noise_targets
from fastadvisor.datasets.duplicates import find_duplicates, mark_repeated
from fastadvisor.datasets.images import ArrayImages, Images, match_files
from fastadvisor.datasets.joined_images import join_images
from fastadvisor.datasets.labels_file import read_labels
from fastadvisor.datasets.types import Source, Split, TrainingData
from fastadvisor.errors import UserError

META, TAIL, NOISE = 0, 1, 2
"""Second word of the seed of each protocol's random generator."""


@dataclass
class _Table:
    """Images and true labels by sample id, and two disjoint sets of ids: the pool to train on, and the meta-set."""

    images: Images
    labels: Ints
    pool_ids: Ints
    meta_ids: Ints


def prepare(source: Source, config: DataConfig, seed: int) -> TrainingData:
    """Apply the protocols of ``config`` to ``source``.

    A sample id is a row of the data set, in its own order; the images of a meta-set that the data set brings come after the
    training images. Training images that the long tail drops stay in the table of images, unused.

    Args:
        source: the data set, which is not modified. Its images are shared, and copied only if they are in memory and the data
            set brings a meta-set.
        config: the settings of the protocols.
        seed: the same seed gives the same data, bit for bit.

    Raises:
        UserError: settings contradict each other or do not suit the data set, meta images are among the training images, a
            label is out of range, or a class has no training or meta images.
    """
    _check_settings(config)
    _check_labels(source)
    meta_rng = np.random.default_rng([seed, META])
    table = (
        _draw_meta(source, config, meta_rng) if source.meta is None else _append_own_meta(source, source.meta, config, meta_rng)
    )
    _warn_of_test_images(table, source.test.images)

    noisy, notes = _make_labels(source, config, np.random.default_rng([seed, NOISE]))
    cut_by = noisy if config.noise_before_imbalance else table.labels
    train_ids = _cut_tail(cut_by, table, source.classes, config, np.random.default_rng([seed, TAIL]))
    labels = table.labels.copy()
    labels[train_ids] = noisy[train_ids]
    return TrainingData(
        name=source.name,
        classes=list(source.classes),
        images=table.images,
        labels=torch.from_numpy(labels),
        true_labels=torch.from_numpy(table.labels),
        train_ids=torch.from_numpy(train_ids),
        meta_ids=torch.from_numpy(table.meta_ids),
        test=source.test,
        mean=source.mean,
        std=source.std,
        image_size=config.image_size or source.image_size,
        val=source.val,
        notes=(*source.notes, *notes),
        meta_held_out=source.meta is None,
    )


def _check_settings(config: DataConfig) -> None:
    if config.labels is not None and config.noise != "none":
        raise UserError(
            f"--labels {config.labels} and --noise {config.noise} both set the training labels: "
            "add --noise none --noise-rate 0 to take the file's (a recipe may have set the noise), or drop --labels."
        )
    if config.labels_key is not None and config.labels is None:
        raise UserError(f"--labels-key {config.labels_key} says which labels of a file to take: name the file with --labels.")
    if config.noise == "none" and config.noise_rate > 0:
        raise UserError(
            f"--noise-rate is {config.noise_rate:g} and --noise is none: name a kind, as in --noise flip, "
            "or set --noise-rate 0."
        )
    if config.flip_map is not None and config.noise != "flip":
        raise UserError(f"--flip-map is for --noise flip, and --noise is {config.noise}: add --noise flip, or drop the map.")


def _check_labels(source: Source) -> None:
    for part, split in (("training", source.train), ("test", source.test), ("meta", source.meta), ("val", source.val)):
        if split is None:
            continue
        wrong = torch.nonzero((split.labels < 0) | (split.labels >= len(source.classes))).flatten()
        if len(wrong):
            position = int(wrong[0])
            raise UserError(
                f"{source.name}: the {part} label at position {position} is {int(split.labels[position])}, "
                f"and there are {len(source.classes)} classes: use 0 to {len(source.classes) - 1}."
            )


def _to_numpy(labels: Tensor) -> Ints:
    return labels.cpu().numpy().astype(np.int64)


def _draw_meta(source: Source, config: DataConfig, rng: np.random.Generator) -> _Table:
    """Draw ``meta_per_class`` images of each class from the training images; none of them has a duplicate in the rest."""
    images, labels, state = source.train.images, _to_numpy(source.train.labels), rng.bit_generator.state
    every, eligible = np.arange(len(labels)), np.ones(len(labels), dtype=np.bool_)
    copies = mark_repeated(images) if isinstance(images, ArrayImages) else None  # files: only if one is drawn
    while True:
        if copies is not None:
            eligible &= ~copies
        rng.bit_generator.state = state  # draw again from the start, without those that have a duplicate
        meta_ids = draw_meta_set(labels, config.meta_per_class, source.classes, eligible, rng)
        pool_ids = np.setdiff1d(every, meta_ids)
        pairs = [] if copies is not None else find_duplicates(images, meta_ids, images, pool_ids)
        if not pairs:
            if pairs is None:
                _warn_unchecked(source.name)
            return _Table(images, labels, pool_ids, meta_ids)
        copies = mark_repeated(images)
        eligible[[pair.one for pair in pairs]] = False


def _append_own_meta(source: Source, meta: Split, config: DataConfig, rng: np.random.Generator) -> _Table:
    """Append the data set's own meta-set to the training images: all of it, or ``meta_per_class`` images of each class."""
    train, labels = source.train.images, _to_numpy(meta.labels)
    rows = np.arange(len(labels))
    if source.meta_drawn:
        rows = draw_meta_set(labels, config.meta_per_class, source.classes, np.ones(len(labels), dtype=np.bool_), rng, leave=0)
    if isinstance(train, ArrayImages) and isinstance(meta.images, ArrayImages):
        sizes = tuple(meta.images.pixels.shape[1:]), tuple(train.pixels.shape[1:])
        if sizes[0] != sizes[1]:
            raise UserError(f"{source.name}: meta images are {sizes[0]} and training images {sizes[1]}: make them equal.")
    _refuse_empty(np.bincount(labels[rows], minlength=len(source.classes)), source.classes, "meta", "add some to it.")
    count = len(source.train)
    known = np.full(len(rows), -1, dtype=np.int64) if source.meta_rows is None else source.meta_rows[rows]
    pool_ids = np.setdiff1d(np.arange(count), known)
    if (known >= 0).any():  # a training list may name an image several times
        pool_ids = pool_ids[~np.isin(match_files(train, train)[pool_ids], known)]
    shared = find_duplicates(meta.images, rows, train, pool_ids)
    if shared is None:
        _warn_unchecked(source.name)
    elif shared:
        raise UserError(
            f"The meta image {meta.images.name(shared[0].one)} is also the training image "
            f"{train.name(shared[0].other)} ({len(shared)} of {len(rows)} meta images are shared): "
            "remove them from one of the two."
        )
    # Meta images that are training images as well keep their rows; the others come after all training images.
    train_labels, new = _to_numpy(source.train.labels), rows[known < 0]
    train_labels[known[known >= 0]] = labels[rows[known >= 0]]
    meta_ids = known.copy()
    meta_ids[known < 0] = np.arange(count, count + len(new))
    return _Table(
        join_images([train, meta.images if len(new) == len(labels) else meta.images.select(new)]) if len(new) else train,
        np.concatenate([train_labels, labels[new]]),
        pool_ids,
        meta_ids,
    )


def _warn_unchecked(name: str) -> None:
    warnings.warn(
        f"{name} is too large to be searched for meta images among the training images before every run: "
        "run 'fastadvisor data check' once.",
        UserWarning,
        stacklevel=4,
    )


def _make_labels(source: Source, config: DataConfig, rng: np.random.Generator) -> tuple[Ints, tuple[str, ...]]:
    """Return the labels as given of all training images, (N,) int64 by sample id, and what to tell the user."""
    labels = _to_numpy(source.train.labels)
    if config.labels is not None:
        found = read_labels(config.labels, source.train.images, labels, source.classes, config.labels_key, config.data_root)
        return found.labels, found.notes
    if config.noise == "none":
        return labels, ()
    targets = noise_targets(config.noise, source.classes, config.flip_map, source.superclasses)
    return corrupt(labels, targets, config.noise_rate, rng), ()


def _cut_tail(labels: Ints, table: _Table, classes: Sequence[str], config: DataConfig, rng: np.random.Generator) -> Ints:
    """Return the sample ids that the long tail keeps; the whole pool if the imbalance factor is 1."""
    if config.imbalance_factor == 1:
        train_ids, way = table.pool_ids, "add some, or remove the class."
    else:
        available = np.bincount(table.labels[table.pool_ids], minlength=len(classes))
        counts = long_tail_profile(available.tolist(), config.imbalance_factor)
        train_ids, way = cut_long_tail(labels, table.pool_ids, counts, rng), "lower --imbalance-factor."
    _refuse_empty(np.bincount(labels[train_ids], minlength=len(classes)), classes, "training", way)
    return train_ids


def _refuse_empty(counts: Ints, classes: Sequence[str], part: str, way: str) -> None:
    for name, count in zip(classes, counts, strict=True):
        if count == 0:
            raise UserError(f"Class {name!r} has no {part} images: {way}")


def _warn_of_test_images(table: _Table, test: Images) -> None:
    """Warn if meta images are test images too: the advisor would learn from the answers."""
    pairs = find_duplicates(table.images, table.meta_ids, test, np.arange(len(test)))
    if pairs:
        warnings.warn(
            f"{len(pairs)} of {len(table.meta_ids)} meta images are test images too "
            f"(first: {table.images.name(pairs[0].one)}): "
            "test accuracy will flatter the run; remove them from one of the two.",
            UserWarning,
            stacklevel=3,
        )
