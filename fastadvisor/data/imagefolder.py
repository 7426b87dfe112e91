"""Folders of images: ROOT/train/<class>/*, ROOT/test/<class>/* (or val/) and, where there is one, ROOT/meta/<class>/*."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastadvisor.config import DataConfig
from fastadvisor.data import decode
from fastadvisor.data.types import Source
from fastadvisor.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, as every torchvision model expects them."""


@dataclass
class Split:
    """The files of one of train, test, meta, in class order and by name within a class."""

    folder: Path
    paths: list[Path]
    labels: list[int]


@dataclass
class Folders:
    """What lies under a root; class numbers are the sorted folder names of train."""

    classes: list[str]
    train: Split
    test: Split
    meta: Split | None


def read(config: DataConfig) -> Source:
    """Read ``config.data_root`` into (N, S, S, 3) uint8 tensors; S is ``config.image_size`` or chosen from the images.

    Raises:
        UserError: a folder or class missing or empty, too little memory, or files that cannot be decoded.
    """
    if config.data_root is None:
        raise UserError("imagefolder needs --data-root DIR, a folder with train/<class>/ and test/<class>/ in it.")
    folders = list_folders(Path(os.path.expanduser(config.data_root)))
    if len(folders.classes) < 2:
        raise UserError(f"{folders.train.folder} holds one class, {folders.classes[0]!r}: a classifier needs two or more.")
    side = config.image_size or decode.choose_side(folders.train.paths)
    check_memory(folders, side)
    train, test = decode_split(folders.train, side), decode_split(folders.test, side)
    meta = decode_split(folders.meta, side) if folders.meta else (None, None)
    return Source(
        "imagefolder",
        folders.classes,
        *train,
        *test,
        mean=MEAN,
        std=STD,
        meta_images=meta[0],
        meta_labels=meta[1],
        paths=[str(path) for path in folders.train.paths],
        meta_paths=[str(path) for path in folders.meta.paths] if folders.meta else [],
    )


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


def check_memory(folders: Folders, side: int) -> None:
    """Refuse, before anything is decoded, what does not fit in main memory.

    Raises:
        UserError: names both sizes and --image-size.
    """
    held = len(folders.train.paths) + len(folders.test.paths)
    if folders.meta:  # protocol.prepare appends it to the training images, which holds both twice for a moment
        held += len(folders.train.paths) + 2 * len(folders.meta.paths)
    needed, available = held * side * side * 3, decode.available_memory()
    if available is not None and needed > available:
        raise UserError(
            f"The images of {folders.train.folder.parent} at {side} x {side} need {needed / 1e9:.1f} GB of memory and "
            f"{available / 1e9:.1f} GB are free: choose a smaller side with --image-size."
        )


def decode_split(split: Split, side: int) -> tuple[Tensor, Tensor]:
    """Return a split's images (N, side, side, 3) uint8 and labels (N,) int64."""
    return decode.decode(split.paths, side), torch.tensor(split.labels, dtype=torch.int64)


def _list_split(folder: Path, classes: list[str]) -> Split:
    found = _class_names(folder)
    for name in sorted(set(found) ^ set(classes)):
        if name in classes:
            raise UserError(f"{folder} has no folder for the class {name!r} of train/: every class must be in both.")
        raise UserError(f"{folder / name} is a class that train/ does not have: add it there or take it out here.")
    split = Split(folder, [], [])
    for label, name in enumerate(classes):
        files = sorted(path for path in (folder / name).iterdir() if _is_image(path))
        if not files:
            raise UserError(f"The class folder {folder / name} holds no images: fill it, or remove the class everywhere.")
        split.paths += files
        split.labels += [label] * len(files)
    return split


def _class_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in decode.EXTENSIONS and not path.name.startswith(".") and path.is_file()
