"""One file a data set: how it lies on people's disks. Reading one opens no image."""

from collections.abc import Callable
from dataclasses import replace

from fastadvisor.config import DataConfig
from fastadvisor.data.readers import (
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
from fastadvisor.data.types import Source
from fastadvisor.errors import UserError, nearest

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
"""Name of a data set -> the function that reads it."""

OF_ONE_SIZE = ("digits", "cifar10", "cifar100")
VARIANTS = {"clothing1m": ("noisy", "clean-and-noisy"), "webvision": ("full", "mini")}


def load_source(config: DataConfig) -> Source:
    """Read the data set that ``config`` names, as it lies on disk.

    Raises:
        UserError: an unknown name, a setting that the data set does not have, or it is missing, incomplete or broken.
    """
    name = config.dataset
    if name not in READERS:
        raise UserError(f"No data set {name!r}.{nearest(name, READERS)} Data sets: {', '.join(READERS)}.")
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
        source = replace(source, meta=list_files.read_meta(config, source.classes), meta_drawn=False)
    return source
