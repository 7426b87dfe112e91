"""Data sets, the label and long-tail protocols, and loaders. See README.md in this folder."""

from collections.abc import Callable

from fastadvisor.config import DataConfig
from fastadvisor.data import cifar, digits, imagefolder
from fastadvisor.data.augment import Augmentation, normalize
from fastadvisor.data.protocol import prepare
from fastadvisor.data.resident import ResidentImages, ResidentLoader
from fastadvisor.data.types import Batch, Source, TrainingData
from fastadvisor.errors import UserError, nearest

READERS: dict[str, Callable[[DataConfig], Source]] = {
    "digits": digits.read,
    "cifar10": cifar.read,
    "cifar100": cifar.read,
    "imagefolder": imagefolder.read,
}
"""Name of a data set -> the function that reads it."""


def load_source(config: DataConfig) -> Source:
    """Read the data set that ``config`` names, as it lies on disk.

    Raises:
        UserError: an unknown name, a setting that the data set does not have, or it is missing, incomplete or broken.
    """
    if config.dataset not in READERS:
        near = nearest(config.dataset, READERS)
        raise UserError(f"No data set {config.dataset!r}.{near} Data sets: {', '.join(READERS)}.")
    if config.dataset == "digits" and config.data_root is not None:
        raise UserError(
            f"digits comes along and reads nothing from --data-root {config.data_root}: "
            "name what lies there, as in --dataset imagefolder, or drop --data-root."
        )
    if config.image_size is not None and config.dataset != "imagefolder":
        raise UserError(f"--image-size is for --dataset imagefolder; {config.dataset} has a size of its own: drop it.")
    return READERS[config.dataset](config)


__all__ = [
    "READERS",
    "Augmentation",
    "Batch",
    "ResidentImages",
    "ResidentLoader",
    "Source",
    "TrainingData",
    "load_source",
    "normalize",
    "prepare",
]
