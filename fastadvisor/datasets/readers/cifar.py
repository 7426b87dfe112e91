"""CIFAR-10 and CIFAR-100: the published pickles, or the same images in folders of classes (formats.md)."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastadvisor.config import DataConfig
from fastadvisor.datasets.images import ArrayImages
from fastadvisor.datasets.readers import imagefolder
from fastadvisor.datasets.types import Source, Split
from fastadvisor.errors import UserError

MEAN = (125.3 / 255, 123.0 / 255, 113.9 / 255)
STD = (63.0 / 255, 62.1 / 255, 66.7 / 255)

ARCHIVES = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

CIFAR100_SUPERCLASSES = {
    "aquatic mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit and vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household electrical devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large man-made outdoor things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large natural outdoor scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large omnivores and herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium-sized mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles 1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles 2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}
"""The data set's own coarse labels, in their order (Krizhevsky 2009)."""

CLASSES = {"cifar10": CIFAR10, "cifar100": tuple(sorted(name for g in CIFAR100_SUPERCLASSES.values() for name in g))}
"""Class names in label order; CIFAR's labels are alphabetical."""


def read(config: DataConfig) -> Source:
    """Read ``config.dataset`` (cifar10 or cifar100) from ``config.data_root``, images of 32 × 32 pixels.

    Raises:
        UserError: no root is given, it holds nothing that this reader knows, the archive is damaged, or the download fails.
    """
    name, archive = config.dataset, ARCHIVES[config.dataset]
    if config.data_root is None:
        raise UserError(
            f"{name} needs a folder: --data-root DIR that holds {archive}/, or --data-root DIR --download to fetch it."
        )
    root = Path(config.data_root)
    if root.name == archive:  # the user named the folder of the archive itself instead of the one above it
        root = root.parent
    if config.download or os.path.isdir(root / archive):  # Path.is_dir raises if the folder may not be read
        return _from_pickles(name, root, config.download)
    if os.path.isdir(root / "train"):
        return _from_folders(name, root)
    raise UserError(
        f"No {name} in {root}: put {archive}/ there, or the images as train/<class>/ and test/<class>/, "
        "or add --download to fetch it."
    )


def superclasses(classes: list[str]) -> list[list[int]]:
    """Return the class numbers of the 20 superclasses of CIFAR-100, in the order of the coarse labels."""
    return [[classes.index(name) for name in group] for group in CIFAR100_SUPERCLASSES.values()]


def _from_pickles(name: str, root: Path, download: bool) -> Source:
    """Read the published pickles through torchvision, which checks their MD5 sums."""
    from torchvision.datasets import CIFAR10 as Torchvision10
    from torchvision.datasets import CIFAR100 as Torchvision100

    kind = Torchvision10 if name == "cifar10" else Torchvision100
    try:
        train, test = (kind(str(root), train=part, download=download) for part in (True, False))
    except (RuntimeError, OSError, EOFError) as error:
        if download:
            way = f"could not be downloaded to {root} ({_join_lines(error)}): fetch the archive elsewhere and unpack it there."
        else:
            way = f"is incomplete or damaged: delete {root / ARCHIVES[name]} and run again with --download."
        raise UserError(f"{name} {way}") from None
    return _make_source(name, list(train.classes), _make_split(train), _make_split(test))


def _from_folders(name: str, root: Path) -> Source:
    """Read ``train/<class>/*`` and ``test/<class>/*``; sorted folder names are the standard label order."""
    folders = imagefolder.list_folders(root)
    for found, standard in zip(folders.classes, CLASSES[name], strict=False):
        if found != standard:
            raise UserError(
                f"{root / 'train'} is not {name}: found the class {found!r} where {standard!r} belongs; "
                "use --dataset imagefolder for other images."
            )
    if len(folders.classes) != len(CLASSES[name]):
        raise UserError(f"{root / 'train'} holds {len(folders.classes)} classes, {name} has {len(CLASSES[name])}.")
    source = _make_source(name, folders.classes, folders.train, folders.test)
    return replace(source, val=folders.val, notes=folders.passed_over.notes())


def _make_source(name: str, classes: list[str], train: Split, test: Split) -> Source:
    groups = superclasses(classes) if name == "cifar100" else None
    return Source(name, classes, train, test, mean=MEAN, std=STD, image_size=32, superclasses=groups)


def _make_split(dataset: Any) -> Split:
    """Return the images, (N, 32, 32, 3) uint8, and the labels of one of torchvision's CIFAR data sets."""
    images = ArrayImages(torch.from_numpy(np.ascontiguousarray(dataset.data)))
    return Split(images, torch.tensor(dataset.targets, dtype=torch.int64))


def _join_lines(error: Exception) -> str:
    return " ".join(str(error).split())
