"""Build the loaders of a run from its settings and its data."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fastadvisor.config import Config, LoaderConfig
from fastadvisor.datasets.images import ArrayImages, Images
from fastadvisor.datasets.paths import Ints
from fastadvisor.datasets.types import Split, TrainingData
from fastadvisor.errors import UserError
from fastadvisor.loading.augment import Augmentation
from fastadvisor.loading.autoaugment import AutoAugment
from fastadvisor.loading.backends import dali
from fastadvisor.loading.backends.dali_pipeline import Work
from fastadvisor.loading.backends.resident import ResidentEvaluation, ResidentImages, ResidentLoader
from fastadvisor.loading.backends.stream import Backend, EvaluationStream, StreamLoader
from fastadvisor.loading.backends.synthetic import SyntheticBackend
from fastadvisor.loading.choose import choose_geometry, choose_loader
from fastadvisor.loading.geometry import Geometry
from fastadvisor.loading.loader import EvaluationLoader, Loader, Loaders
from fastadvisor.loading.memory import decode_split
from fastadvisor.loading.order import Order
from fastadvisor.loading.resized_cache import cache_resized
from fastadvisor.loading.unreadable import BadImages
from fastadvisor.runtime.environment import cpu_cores

MOST_WORKERS = 16
"""Worker processes of a loader, at most, if the user does not say how many."""


def build_loaders(config: Config, data: TrainingData, device: torch.device, rank: int = 0, ranks: int = 1) -> Loaders:
    """Build the loaders of a training run.

    Args:
        config: the settings of the run; batch sizes are those of all ranks together.
        data: the data to draw from; for a resident loader :func:`.memory.decode_into_memory` has decoded the images.
        device: the device of the batches.
        rank: the number of this process, which sees the ``rank``-th part of each batch of all ranks.
        ranks: number of processes that share an epoch of the training, meta and test images.

    Raises:
        UserError: a batch is larger than the set that it is drawn from, the images do not fit in memory, too many images cannot
            be read, or settings contradict each other.
    """
    geometry = choose_geometry(config, data)
    size = geometry.size
    name, why = choose_loader(config, data, size, device)
    if config.cutout > size:
        raise UserError(f"--cutout {config.cutout} is larger than the images, which are {size} pixels: use less.")
    counts = _BadImagesByPart(data, config)
    if name == "resident":
        data = counts.drop_bad_images(data)
    else:
        counts.count_missing_files(data)
        for part in counts.all():
            part.probe()
    batch, meta_batch = _split_batch_sizes(config, data, ranks)
    # Two seeds, so that the order of the meta-set does not depend on that of the training set.
    parts = ((data.train_ids, batch, 2 * config.seed), (data.meta_ids, meta_batch, 2 * config.seed + 1))
    pad = _build_augmentation(config, data) if geometry.crop == "pad" else None
    train: Loader
    meta: Loader
    if name == "resident":
        table, augment = ResidentImages.of(data, device), _build_augmentation(config, data)
        train, meta = (
            ResidentLoader(table, ids, batch, augment=augment, device=device, seed=seed, rank=rank, ranks=ranks)
            for ids, batch, seed in parts
        )
    else:
        labels = data.labels.to(device)
        if pad is not None:
            pad.check_side(size)
        if name == "torch" and (workers := _count_workers(config)):
            from fastadvisor.loading.backends.dataloader import check_open_files, check_shared_memory

            tests = [min(config.eval_batch_size, len(part)) for part in (data.test, data.val) if part is not None]
            check_shared_memory((batch, meta_batch), tests, size, workers)
            check_open_files(3, workers)  # training, meta, and one loader for testing at a time
        train, meta = (
            StreamLoader(
                _build_backend(name, data.images, geometry, config, data, device, batch, training=True, seed=seed, rank=rank),
                Order(_to_numpy(ids), batch, seed, rank, ranks, _to_numpy(data.labels[ids])),
                labels,
                bad=bad,
                augment=pad if name != "synthetic" else None,
                mean=data.mean,
                std=data.std,
                hole=config.cutout if name != "synthetic" else 0,
                device=device,
            )
            for (ids, batch, seed), bad in zip(parts, (counts.train, counts.meta), strict=True)
        )
    test = _build_test_loader(name, geometry, config, data, data.test, device, counts.test, rank, ranks)
    val = None
    if data.val is not None and counts.val is not None:
        val = _build_test_loader(name, geometry, config, data, data.val, device, counts.val, rank, ranks)
    return Loaders(name, why, size, data, train, meta, test, val, counts.all())


def build_test_loader(config: Config, data: TrainingData, device: torch.device) -> tuple[EvaluationLoader, int]:
    """Build only the loader of the test images; return it and the side in pixels of its images.

    Raises:
        UserError: as in :func:`build_loaders`.
    """
    geometry = choose_geometry(config, data)
    data = replace(data, test=cache_resized(data.test, "test", config, geometry), val=None)
    name, _ = choose_loader(config, data, geometry.size, device)
    counts = _BadImagesByPart(data, config)
    if name == "resident":
        test = decode_split(data.test, geometry)
        data = replace(data, test=_drop_bad(test, counts.test))
    elif name == "synthetic":
        name = "torch"  # the test images are real ones all the same
    if name == "torch" and (workers := _count_workers(config)):
        from fastadvisor.loading.backends.dataloader import check_shared_memory

        check_shared_memory((), (min(config.eval_batch_size, len(data.test)),), geometry.size, workers)
    return _build_test_loader(name, geometry, config, data, data.test, device, counts.test), geometry.size


class _BadImagesByPart:
    """The images that could not be read, for each part of the data."""

    def __init__(self, data: TrainingData, config: LoaderConfig) -> None:
        most = config.max_bad_fraction
        self.train = BadImages("training", data.images, len(data.train_ids), most)
        self.meta = BadImages("meta", data.images, len(data.meta_ids), most)
        self.test = BadImages("test", data.test.images, len(data.test), most)
        self.val = None if data.val is None else BadImages("val", data.val.images, len(data.val), most)

    def all(self) -> list[BadImages]:
        """Return the counts of the parts that the data has."""
        return [self.train, self.meta, self.test, *([] if self.val is None else [self.val])]

    def count_missing_files(self, data: TrainingData) -> None:
        """Count missing and empty files before the run begins, when no work can be lost yet."""
        for part, ids in zip(self.all(), (data.train_ids, data.meta_ids, None, None), strict=False):
            rows = np.arange(len(part.images)) if ids is None else _to_numpy(ids)
            sizes = part.images.sizes(rows)
            part.add({int(rows[at]): "no such file" if sizes[at] < 0 else "empty file" for at in np.flatnonzero(sizes <= 0)})

    def drop_bad_images(self, data: TrainingData) -> TrainingData:
        """Return ``data``, whose images are in memory, without those that could not be decoded."""
        assert isinstance(data.images, ArrayImages)
        kept = []
        for part, ids in ((self.train, data.train_ids), (self.meta, data.meta_ids)):
            part.add({row: data.images.bad[row] for row in ids.tolist() if row in data.images.bad})
            kept.append(ids[torch.from_numpy(~np.isin(_to_numpy(ids), list(part.reasons)))] if part.reasons else ids)
        val = None if data.val is None or self.val is None else _drop_bad(data.val, self.val)
        return replace(data, train_ids=kept[0], meta_ids=kept[1], test=_drop_bad(data.test, self.test), val=val)


def _drop_bad(split: Split, counted: BadImages) -> Split:
    """Return ``split``, whose images are in memory, without those that could not be decoded; they are counted."""
    images = split.images
    assert isinstance(images, ArrayImages)
    counted.add(images.bad)
    if not images.bad:
        return split
    good = np.setdiff1d(np.arange(len(images)), list(images.bad))
    if not len(good):
        row, reason = next(iter(images.bad.items()))
        raise UserError(f"None of the {counted.part} images can be read (first: {images.name(row)}: {reason}): replace them.")
    return Split(images.select(good), split.labels[torch.from_numpy(good)])


def _split_batch_sizes(config: LoaderConfig, data: TrainingData, ranks: int) -> tuple[int, int]:
    """Return the batch sizes of one rank, for training and for the meta-set.

    Raises:
        UserError: a batch is larger than the set that it is drawn from, or cannot be split evenly.
    """
    pieces = ranks * config.accumulate
    meta = config.meta_batch_size
    if meta is None:
        meta = min(config.batch_size, len(data.meta_ids))
        meta = max(meta - meta % pieces, 1)
    for flag, batch, part, ids in (
        ("--batch-size", config.batch_size, "training", data.train_ids),
        ("--meta-batch-size", meta, "meta", data.meta_ids),
    ):
        if batch > len(ids):
            raise UserError(f"{flag} {batch} is larger than the {len(ids)} {part} images there are: lower it.")
        if batch % pieces:
            of = f"{ranks} processes" if ranks > 1 else ""
            of += (" of " if of else "") + f"{config.accumulate} micro-batches" if config.accumulate > 1 else ""
            raise UserError(f"{flag} {batch} cannot be shared evenly by {of}: make it a multiple of {pieces}.")
    return config.batch_size // ranks, meta // ranks


def _build_test_loader(
    name: str,
    geometry: Geometry,
    config: Config,
    data: TrainingData,
    split: Split,
    device: torch.device,
    bad: BadImages,
    rank: int = 0,
    ranks: int = 1,
) -> EvaluationLoader:
    batch, labels = config.eval_batch_size, split.labels.to(device)
    if name == "resident":
        assert isinstance(split.images, ArrayImages)
        return ResidentEvaluation(split.images.pixels.to(device), labels, batch, data.mean, data.std, rank, ranks)
    backend = _build_backend(name, split.images, geometry, config, data, device, batch, training=False)
    return EvaluationStream(backend, labels, batch, bad=bad, mean=data.mean, std=data.std, rank=rank, ranks=ranks)


def _build_backend(
    name: str,
    images: Images,
    geometry: Geometry,
    config: Config,
    data: TrainingData,
    device: torch.device,
    batch_size: int,
    *,
    training: bool,
    seed: int = 0,
    rank: int = 0,
) -> Backend:
    workers = _count_workers(config)
    if name == "synthetic":
        return SyntheticBackend(batch_size, geometry.size, device)
    if name == "dali":
        mirror, policy = training and config.horizontal_flip, config.auto_augment if training else "none"
        if geometry.crop == "pad":
            policy = "none"  # it follows padding and cropping, on the device
        own = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0]) % 2**31  # for DALI's own random numbers
        work = Work(geometry, batch_size, device, workers, data.mean, data.std, training, mirror, policy, own)
        return dali.DaliBackend(images, work)
    from fastadvisor.loading.backends.dataloader import (  # torchvision's transforms take a second to import
        Batches,
        TorchBackend,
    )

    batches = Batches(images, geometry, config.horizontal_flip, config.auto_augment)
    return TorchBackend(batches, workers, pin_memory=device.type == "cuda")


def _build_augmentation(config: LoaderConfig, data: TrainingData) -> Augmentation:
    policy = AutoAugment(config.auto_augment) if config.auto_augment != "none" else None
    return Augmentation(config.crop_padding, config.horizontal_flip, data.mean, data.std, policy, config.cutout)


def _count_workers(config: LoaderConfig) -> int:
    return min(MOST_WORKERS, cpu_cores()) if config.workers is None else config.workers


def _to_numpy(ids: Tensor) -> Ints:
    return ids.cpu().numpy().astype(np.int64)
