"""One file for each data set, which knows its layout on disk. Reading a data set opens no image."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fastadvisor.config import DataConfig
from fastadvisor.datasets.images import match_files
from fastadvisor.datasets.readers import (
    animal10n,
    cifar,
    clothing1m,
    digits,
    food101n,
    imagefolder,
    list_files,
    long_tail,
    webdataset,
    webvision,
)
from fastadvisor.datasets.types import Source
from fastadvisor.errors import UserError, suggest

READERS: dict[str, Callable[[DataConfig], Source]] = {
    "digits": digits.read,
    "cifar10": cifar.read,
    "cifar100": cifar.read,
    "imagefolder": imagefolder.read,
    "list": list_files.read,
    "webdataset": webdataset.read,
    "imagenet-lt": long_tail.read,
    "places-lt": long_tail.read,
    "clothing1m": clothing1m.read,
    "webvision": webvision.read,
    "food101n": food101n.read,
    "animal10n": animal10n.read,
}
"""The function that reads a data set, by the name of the data set."""

OF_ONE_SIZE = ("digits", "cifar10", "cifar100")
VARIANTS = {"clothing1m": ("noisy", "clean-and-noisy"), "webvision": ("full", "mini")}


def load_source(config: DataConfig) -> Source:
    """Read the data set that ``config`` names from disk.

    Raises:
        UserError: the name is unknown, a setting does not apply to the data set, or its files are missing or damaged.
    """
    name = config.dataset
    if name not in READERS:
        raise UserError(f"No data set {name!r}.{suggest(name, READERS)} Data sets: {', '.join(READERS)}.")
    if name == "digits" and config.data_root is not None:
        raise UserError(
            f"digits comes along and reads nothing from --data-root {config.data_root}: "
            "name what lies there, as in --dataset imagefolder, or drop --data-root."
        )
    if config.image_size is not None and name in OF_ONE_SIZE:
        raise UserError(f"--image-size is for data sets of files, as imagefolder; {name} has a size of its own: drop it.")
    if config.variant is not None and config.variant not in VARIANTS.get(name, ()):
        known = ", ".join(f"{one} ({' or '.join(names)})" for one, names in VARIANTS.items())
        raise UserError(f"--variant {config.variant} is no variant of {name}; data sets with variants: {known}.")
    for flag, value in (("train", config.train_list), ("test", config.test_list)):
        if value is not None and name != "list":
            raise UserError(f"--{flag}-list is for --dataset list, and --dataset is {name}: drop one of the two.")
    if config.meta_list is not None and name in OF_ONE_SIZE:
        raise UserError(f"--meta-list is for data sets of files, and {name} is none: drop it, its meta-set is held out.")
    source = READERS[name](config)
    if config.meta_list is not None and name != "list":
        source = list_files.add_meta_list(source, config)
    return mark_shared_meta_images(source)


def mark_shared_meta_images(source: Source) -> Source:
    """Return ``source`` with ``meta_rows`` set: which of its meta images are training images as well, by their paths.

    Raises:
        UserError: a meta image is a test or val image, or is named twice.
    """
    meta = source.meta
    if meta is None or source.meta_drawn:
        return source
    for part, split in (("test", source.test), ("val", source.val)):
        among = np.empty(0) if split is None else np.flatnonzero(match_files(meta.images, split.images) >= 0)
        if len(among):
            raise UserError(
                f"{meta.images.name(int(among[0]))} is named as an image of the meta-set and is a {part} image "
                f"({len(among)} of {len(meta)} are): a run must not learn from what it is "
                f"{'tested' if part == 'test' else 'chosen'} on; name other images."
            )
    rows, first = match_files(meta.images, source.train.images), match_files(meta.images, meta.images)
    again = np.flatnonzero((first >= 0) & (first != np.arange(len(meta))))
    differ = again[(meta.labels[again] != meta.labels[first[again]]).numpy()]
    if len(differ):
        raise UserError(
            f"{meta.images.name(int(differ[0]))} is named twice as an image of the meta-set, with two labels: leave one of "
            "them out."
        )
    inside = rows[rows >= 0]
    if not len(inside):
        return source
    unique, counts = np.unique(inside, return_counts=True)
    if (counts > 1).any():
        twice = source.train.images.name(int(unique[counts > 1][0]))
        raise UserError(f"{twice} is named twice as an image of the meta-set: leave one of the two out.")
    note = (
        f"{'All' if len(inside) == len(meta) else f'{len(inside):,} of the'} {len(meta):,} images of the meta-set are training "
        "images: they are taken out of the training set, and have the labels that the meta-set gives them."
    )
    return replace(source, meta_rows=rows, notes=(*source.notes, note))
