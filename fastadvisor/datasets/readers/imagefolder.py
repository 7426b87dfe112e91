"""Folders of images: ROOT/train/<class>/*, ROOT/test/<class>/* (or val/) and, optionally, ROOT/meta/<class>/*.

The images of a class are in its folder or in folders below it, in the same order as in torchvision's ImageFolder.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from fastadvisor.config import DataConfig
from fastadvisor.datasets.images import FileImages
from fastadvisor.datasets.paths import PathTable
from fastadvisor.datasets.types import Source, Split
from fastadvisor.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet, which every torchvision model expects."""

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm", ".gif", ".tif", ".tiff"}
)
"""Extensions of files that are taken for images; other files are passed over and counted."""

OTHER_IMAGES = frozenset({".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".dng", ".cr2", ".nef", ".arw"})
"""Extensions of files that hold images in formats that are not read here."""


@dataclass
class PassedOver:
    """Counts of the files of a data set that are not used, by folder and kind."""

    kinds: dict[str, Counter[str]] = field(default_factory=dict)

    def count(self, folder: Path, kind: str) -> None:
        """Count a file that is passed over in ``folder``, the folder of a part such as train."""
        self.kinds.setdefault(str(folder), Counter())[kind] += 1

    def notes(self) -> tuple[str, ...]:
        """Return one sentence about all of them; an empty tuple if there are none."""
        total = sum(counts.total() for counts in self.kinds.values())
        if not total:
            return ()
        places = [
            f"in {folder} " + ", ".join(f"{kind}: {count:,}" for kind, count in counts.most_common())
            for folder, counts in self.kinds.items()
        ]
        return (f"{total:,} {'file was' if total == 1 else 'files were'} passed over: {'; '.join(places)}.",)


@dataclass
class Folders:
    """The contents of a root; classes are numbered by the sorted names of the folders in train/."""

    classes: list[str]
    train: Split
    test: Split
    meta: Split | None
    val: Split | None
    """The images of val/, if there is a folder test/ as well; otherwise val/ is the test set."""
    passed_over: PassedOver


def read(config: DataConfig) -> Source:
    """List the files under ``config.data_root``, in the order of the classes, and by name within a class.

    Raises:
        UserError: a folder or class is missing or empty, or a folder cannot be read.
    """
    if config.data_root is None:
        raise UserError("imagefolder needs --data-root DIR, a folder with train/<class>/ and test/<class>/ in it.")
    root = Path(config.data_root)
    folders = list_folders(root)
    if len(folders.classes) < 2:
        raise UserError(f"{root / 'train'} holds one class, {folders.classes[0]!r}: a classifier needs two or more.")
    return Source(
        "imagefolder",
        folders.classes,
        folders.train,
        folders.test,
        mean=MEAN,
        std=STD,
        meta=folders.meta,
        val=folders.val,
        notes=folders.passed_over.notes(),
    )


def list_folders(root: Path) -> Folders:
    """List the image files under ``root``; other files (hidden ones, other formats, dangling links, ...) are counted.

    Raises:
        UserError: train or test is missing, a class is not in every part, or a class folder holds no images or cannot be
            read.
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
    classes = _list_class_names(root / "train")
    if not classes:
        raise UserError(f"{root / 'train'} has no class folders: lay the images out as train/<class>/<image>.")
    passed_over = PassedOver()
    train, *tested = (_list_split(folder, classes, passed_over) for folder in (root / "train", *tests))
    meta = _list_split(root / "meta", classes, passed_over) if (root / "meta").is_dir() else None
    return Folders(classes, train, tested[0], meta, tested[1] if len(tested) > 1 else None, passed_over)


def _list_split(folder: Path, classes: list[str], passed_over: PassedOver) -> Split:
    found = _list_class_names(folder)
    for name in sorted(set(found) ^ set(classes)):
        if name in classes:
            raise UserError(f"{folder} has no folder for the class {name!r} of train/: every class must be in both.")
        raise UserError(f"{folder / name} is a class that train/ does not have: add it there or take it out here.")
    _count_files_outside_classes(folder, passed_over)
    paths, counts = [], []
    for name in classes:
        files = [f"{name}/{file}" for file in image_files(folder / name, folder, passed_over)]
        if not files:
            raise UserError(f"The class folder {folder / name} holds no images: fill it, or remove the class everywhere.")
        paths += files
        counts.append(len(files))
    labels = torch.from_numpy(np.repeat(np.arange(len(classes), dtype=np.int64), counts))
    return Split(FileImages(folder, PathTable.of(paths)), labels)


def image_files(folder: Path, part: Path, passed_over: PassedOver) -> list[str]:
    """Return the paths of the image files in and below ``folder``, relative to it, in the order of torchvision's ImageFolder.

    That order is by the path of the folder, and by name within a folder. Files that are passed over are counted for ``part``.
    """
    files: list[tuple[str, str]] = []
    status = os.stat(part)  # a link back to the folder of the part would put the images of all classes into this one
    above = frozenset({(status.st_dev, status.st_ino)} if folder != part else ())
    for beneath, entry in _walk(folder, "", above, part, passed_over):
        kind = _find_reason_to_pass_over(entry)
        if kind is None:
            files.append((beneath, entry.name))
        else:
            passed_over.count(part, kind)
    return [os.path.join(beneath, name) for beneath, name in sorted(files)]


def _walk(
    folder: Path, beneath: str, above: frozenset[tuple[int, int]], part: Path, passed_over: PassedOver
) -> Iterator[tuple[str, "os.DirEntry[str]"]]:
    """Yield the files in and below ``folder / beneath``, each with its folder; links are followed, but never in a circle.

    Args:
        folder: the folder of the class, where the walk began.
        beneath: the folder to walk, relative to ``folder``.
        above: device and inode of every folder that contains it.
        part: the folder of the part, for which files that are passed over are counted.
        passed_over: the counts, which are added to.
    """
    here = os.path.join(folder, beneath) if beneath else str(folder)
    status = os.stat(here)
    if (status.st_dev, status.st_ino) in above:
        passed_over.count(part, "links to folders they are in")
        return
    with os.scandir(here) as entries:
        found = list(entries)
    for entry in found:
        if not _is_folder(entry):
            yield beneath, entry
        elif entry.name.startswith("."):
            passed_over.count(part, "hidden folders")
        else:
            inner = above | {(status.st_dev, status.st_ino)}
            yield from _walk(folder, os.path.join(beneath, entry.name), inner, part, passed_over)


def _count_files_outside_classes(folder: Path, passed_over: PassedOver) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_folder(entry):
                if entry.name.startswith("."):
                    passed_over.count(folder, "hidden folders")
            else:
                passed_over.count(folder, _find_reason_to_pass_over(entry) or "images in no class folder")


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _find_reason_to_pass_over(entry: "os.DirEntry[str]") -> str | None:
    """Return the kind under which a file is passed over and counted; None for an image."""
    suffix = os.path.splitext(entry.name)[1].lower()
    if entry.name.startswith("."):
        return "hidden"
    if suffix not in EXTENSIONS:
        return f"{suffix or 'without an extension'}{' (not read here, convert them)' if suffix in OTHER_IMAGES else ''}"
    try:
        if entry.is_file():
            return None
    except OSError:  # a link to itself
        pass
    return "dangling links" if entry.is_symlink() else "neither files nor folders"


def _list_class_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
