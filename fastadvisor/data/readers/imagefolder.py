"""Folders of images: ROOT/train/<class>/*, ROOT/test/<class>/* (or val/) and, where there is one, ROOT/meta/<class>/*."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastadvisor.config import DataConfig
from fastadvisor.data.images import FileImages
from fastadvisor.data.paths import PathTable
from fastadvisor.data.types import Source, Split
from fastadvisor.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, as every torchvision model expects them."""

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".gif", ".tif", ".tiff"})
"""What counts as an image; other files are passed over."""


@dataclass
class Folders:
    """What lies under a root; class numbers are the sorted folder names of train."""

    classes: list[str]
    train: Split
    test: Split
    meta: Split | None


def read(config: DataConfig) -> Source:
    """Read the names of the files under ``config.data_root``, in class order and by name within a class.

    Raises:
        UserError: a folder or class missing or empty, or a folder that cannot be read.
    """
    if config.data_root is None:
        raise UserError("imagefolder needs --data-root DIR, a folder with train/<class>/ and test/<class>/ in it.")
    root = Path(os.path.expanduser(config.data_root))
    folders = list_folders(root)
    if len(folders.classes) < 2:
        raise UserError(f"{root / 'train'} holds one class, {folders.classes[0]!r}: a classifier needs two or more.")
    return Source("imagefolder", folders.classes, folders.train, folders.test, mean=MEAN, std=STD, meta=folders.meta)


def list_folders(root: Path) -> Folders:
    """List the image files under ``root`` (hidden files and folders, and files that are no images, are passed over).

    Raises:
        UserError: train or test missing, a class of one that another lacks, a class folder without images, or one that
            cannot be read.
    """
    try:
        return _list_folders(root)
    except OSError as error:
        raise UserError(f"The folder {error.filename} cannot be read ({error.strerror}): check --data-root.") from None


def _list_folders(root: Path) -> Folders:
    if not root.is_dir():
        raise UserError(f"There is no folder {root}: --data-root must hold train/<class>/ and test/<class>/.")
    tests = [root / name for name in ("test", "val") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not tests:
        lacking = "test/ (or val/)" if (root / "train").is_dir() else "train/"
        raise UserError(f"{root} has no folder {lacking}: lay the images out as train/<class>/ and test/<class>/.")
    classes = _class_names(root / "train")
    if not classes:
        raise UserError(f"{root / 'train'} has no class folders: lay the images out as train/<class>/<image>.")
    meta = _list_split(root / "meta", classes) if (root / "meta").is_dir() else None
    return Folders(classes, _list_split(root / "train", classes), _list_split(tests[0], classes), meta)


def _list_split(folder: Path, classes: list[str]) -> Split:
    found = _class_names(folder)
    for name in sorted(set(found) ^ set(classes)):
        if name in classes:
            raise UserError(f"{folder} has no folder for the class {name!r} of train/: every class must be in both.")
        raise UserError(f"{folder / name} is a class that train/ does not have: add it there or take it out here.")
    paths, counts = [], []
    for name in classes:
        files = image_files(folder / name)
        if not files:
            raise UserError(f"The class folder {folder / name} holds no images: fill it, or remove the class everywhere.")
        paths += [f"{name}/{file}" for file in files]
        counts.append(len(files))
    labels = torch.from_numpy(np.repeat(np.arange(len(classes), dtype=np.int64), counts))
    return Split(FileImages(folder, PathTable.of(paths)), labels)


def image_files(folder: Path) -> list[str]:
    """Return the sorted names of the image files in ``folder`` itself."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if _is_image(entry.name) and entry.is_file())


def _class_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")
