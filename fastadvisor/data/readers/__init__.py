"""One file a data set: how it lies on people's disks. Reading one opens no image."""

from collections.abc import Callable

from fastadvisor.config import DataConfig
from fastadvisor.data.readers import cifar, digits, imagefolder
from fastadvisor.data.types import Source
from fastadvisor.errors import UserError, nearest

READERS: dict[str, Callable[[DataConfig], Source]] = {
    "digits": digits.read,
    "cifar10": cifar.read,
    "cifar100": cifar.read,
    "imagefolder": imagefolder.read,
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
    for flag, value in (("train", config.train_list), ("test", config.test_list), ("meta", config.meta_list)):
        if value is not None and name != "list":
            raise UserError(f"--{flag}-list is for --dataset list, and --dataset is {name}: drop one of the two.")
    return READERS[name](config)
