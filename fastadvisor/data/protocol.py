"""A source becomes training data: meta-set out, long tail cut, labels corrupted, in this order (method.md).

The order matters: with the meta-set drawn last, or from a second shuffle, meta images leak into training (design.md,
trap 11). Every stage has a random stream of its own, so the meta-set is the same whatever the noise.
"""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastadvisor.config import DataConfig
from fastadvisor.data.corruption import Ints, corrupt, long_tail, long_tail_counts, meta_split, noise_targets
from fastadvisor.data.labels_file import read_labels
from fastadvisor.data.types import Source, TrainingData
from fastadvisor.errors import UserError

META, TAIL, NOISE = 0, 1, 2
"""Second word of the seed of each stage's stream."""


@dataclass
class _Table:
    """Images, true labels and file names by sample id, and the two disjoint sets of ids."""

    images: Tensor
    labels: Ints
    pool_ids: Ints
    meta_ids: Ints


def prepare(source: Source, config: DataConfig, seed: int) -> TrainingData:
    """Apply the protocols of ``config`` to ``source``.

    Sample ids are rows of the data set, in its own order; a meta-set that the data set brings comes after them.
    Training images that the long tail drops stay in the table, unused.

    Args:
        source: not modified; its image tensor is shared, not copied, unless it brings a meta-set.
        config: what to do.
        seed: the same seed gives the same data, bit for bit.

    Raises:
        UserError: settings that contradict each other or do not suit the data set, meta images among the training
            images, labels out of range, or a class without training or meta images.
    """
    _check_settings(config)
    _check_labels(source)
    digests = content_digests(source.images)
    table = _own_meta(source, digests) if source.meta_images is not None else _drawn_meta(source, digests, config, seed)
    _warn_of_test_images(table.images[torch.from_numpy(table.meta_ids)], source.test_images, table.meta_ids)

    noisy = _noisy_labels(source, config, np.random.default_rng([seed, NOISE]))
    cut_by = noisy if config.noise_before_imbalance else table.labels
    train_ids = _cut(cut_by, table.pool_ids, source.classes, config, np.random.default_rng([seed, TAIL]))
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
        test_images=source.test_images,
        test_labels=source.test_labels,
        mean=source.mean,
        std=source.std,
        meta_held_out=source.meta_images is None,
    )


def content_digests(images: Tensor) -> NDArray[np.bytes_]:
    """Return a 16-byte digest of each image of (N, H, W, 3) uint8; equal digests mean equal bytes."""
    rows = images.cpu().contiguous().numpy()
    # "V16", not "S16": numpy strips trailing zero bytes of strings.
    return np.array([hashlib.blake2b(row, digest_size=16).digest() for row in rows], dtype="V16").reshape(-1)


def _check_settings(config: DataConfig) -> None:
    if config.labels is not None and config.noise != "none":
        raise UserError(
            f"--labels {config.labels} and --noise {config.noise} both set the training labels: "
            "add --noise none --noise-rate 0 to take the file's (a recipe may have set the noise), or drop --labels."
        )
    if config.noise == "none" and config.noise_rate > 0:
        raise UserError(
            f"--noise-rate is {config.noise_rate:g} and --noise is none: name a kind, as in --noise flip, "
            "or set --noise-rate 0."
        )
    if config.flip_map is not None and config.noise != "flip":
        raise UserError(f"--flip-map is for --noise flip, and --noise is {config.noise}: add --noise flip, or drop the map.")


def _check_labels(source: Source) -> None:
    named = {"training": source.labels, "test": source.test_labels, "meta": source.meta_labels}
    for part, labels in named.items():
        if labels is None:
            continue
        wrong = torch.nonzero((labels < 0) | (labels >= len(source.classes))).flatten()
        if len(wrong):
            position = int(wrong[0])
            raise UserError(
                f"{source.name}: the {part} label at position {position} is {int(labels[position])}, "
                f"and there are {len(source.classes)} classes: use 0 to {len(source.classes) - 1}."
            )


def _drawn_meta(source: Source, digests: NDArray[np.bytes_], config: DataConfig, seed: int) -> _Table:
    """Take ``meta_per_class`` images a class out of the training images, none of which has a twin left behind."""
    labels = source.labels.cpu().numpy().astype(np.int64)
    _, group, sizes = np.unique(digests, return_inverse=True, return_counts=True)
    rng = np.random.default_rng([seed, META])
    meta_ids = meta_split(labels, config.meta_per_class, source.classes, sizes[group.reshape(-1)] == 1, rng)
    return _Table(source.images, labels, np.setdiff1d(np.arange(len(labels)), meta_ids), meta_ids)


def _own_meta(source: Source, digests: NDArray[np.bytes_]) -> _Table:
    """Append the data set's own meta-set to the training images, whole."""
    assert source.meta_images is not None
    assert source.meta_labels is not None
    if source.meta_images.shape[1:] != source.images.shape[1:]:
        sizes = tuple(source.meta_images.shape[1:]), tuple(source.images.shape[1:])
        raise UserError(f"{source.name}: meta images are {sizes[0]} and training images {sizes[1]}: make them equal.")
    meta_labels = source.meta_labels.cpu().numpy().astype(np.int64)
    _refuse_empty(np.bincount(meta_labels, minlength=len(source.classes)), source.classes, "meta", "add some to it.")
    first = {digest: row for row, digest in reversed(list(enumerate(digests.tolist())))}
    own = content_digests(source.meta_images).tolist()
    shared = [row for row, digest in enumerate(own) if digest in first]
    if shared:
        raise UserError(
            f"The meta image {_called(shared[0], source.meta_paths)} is also the training image "
            f"{_called(first[own[shared[0]]], source.paths)} ({len(shared)} of {len(meta_labels)} meta images are shared): "
            "remove them from one of the two."
        )
    count = len(source.labels)
    return _Table(
        torch.cat([source.images, source.meta_images]),
        np.concatenate([source.labels.cpu().numpy().astype(np.int64), meta_labels]),
        np.arange(count),
        np.arange(count, count + len(meta_labels)),
    )


def _noisy_labels(source: Source, config: DataConfig, rng: np.random.Generator) -> Ints:
    """Return what the run is to believe of every training image of the source, (N,) by sample id."""
    labels = source.labels.cpu().numpy().astype(np.int64)
    if config.labels is not None:
        return read_labels(config.labels, len(labels), len(source.classes))
    if config.noise == "none":
        return labels
    targets = noise_targets(config.noise, source.classes, config.flip_map, source.superclasses)
    return corrupt(labels, targets, config.noise_rate, rng)


def _cut(labels: Ints, pool_ids: Ints, classes: Sequence[str], config: DataConfig, rng: np.random.Generator) -> Ints:
    """Return the sample ids that the long tail keeps, all of ``pool_ids`` at an imbalance factor of 1."""
    if config.imbalance_factor == 1:
        train_ids, way = pool_ids, "add some, or remove the class."
    else:
        counts = long_tail_counts(len(pool_ids) // len(classes), len(classes), config.imbalance_factor)
        train_ids, way = long_tail(labels, pool_ids, counts, rng), "lower --imbalance-factor."
    _refuse_empty(np.bincount(labels[train_ids], minlength=len(classes)), classes, "training", way)
    return train_ids


def _refuse_empty(counts: Ints, classes: Sequence[str], part: str, way: str) -> None:
    for name, count in zip(classes, counts, strict=True):
        if count == 0:
            raise UserError(f"Class {name!r} has no {part} images: {way}")


def _warn_of_test_images(meta_images: Tensor, test_images: Tensor, meta_ids: Ints) -> None:
    """Say so where meta images are test images too: the advisor would be told the answers."""
    if meta_images.shape[1:] != test_images.shape[1:]:
        return
    test = set(content_digests(test_images).tolist())
    rows = [row for row, digest in enumerate(content_digests(meta_images).tolist()) if digest in test]
    if rows:
        warnings.warn(
            f"{len(rows)} of {len(meta_ids)} meta images are test images too (first: sample {meta_ids[rows[0]]}): "
            "test accuracy will flatter the run; remove them from one of the two.",
            UserWarning,
            stacklevel=3,
        )


def _called(row: int, paths: Sequence[str]) -> str:
    return paths[row] if paths else f"number {row}"
