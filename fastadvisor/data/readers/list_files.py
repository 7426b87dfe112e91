"""Any images in list files: lines of ``path label``, or a CSV with ``path,label[,split]`` (formats.md)."""

import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastadvisor.config import DataConfig
from fastadvisor.data.paths import Ints, PathTable
from fastadvisor.data.readers.imagefolder import MEAN, STD
from fastadvisor.data.readers.lists import images_below, number_of_classes, read_csv, read_list, read_names
from fastadvisor.data.types import Source, Split
from fastadvisor.errors import UserError

DEFAULTS: dict[str, tuple[str, ...]] = {
    "train": ("train.txt", "train.csv"),
    "meta": ("meta.txt", "meta.csv"),
    "test": ("test.txt", "test.csv", "val.txt", "val.csv"),
}
"""Where in the root each list is looked for."""

NUMBER = re.compile(r"[-+]?\d+(\.\d*)?")
HOW = "lines of 'path label', or a CSV with path,label[,split]"


class _Part(NamedTuple):
    file: Path
    paths: PathTable
    labels: Ints
    names: list[str] | None
    """What the labels are indices into; None where they are class numbers."""


def read(config: DataConfig) -> Source:
    """Read the lists of ``config``; paths in them are relative to ``config.data_root``, without one to the list's folder.

    Classes are numbers, named by the lines of ROOT/classes.txt if there is one, or, in a CSV, names, in alphabetical order.

    Raises:
        UserError: a list is missing or cannot be read, there are no test images, or labels are numbers here and names there.
    """
    if config.data_root is None and config.train_list is None:
        raise UserError(f"list needs --train-list FILE, {HOW}, or --data-root DIR with a train.txt or train.csv in it.")
    root = Path(os.path.expanduser(config.data_root or os.path.dirname(os.path.expanduser(config.train_list or ""))) or ".")
    files = {part: _find(root, part, getattr(config, f"{part}_list")) for part in ("train", "meta", "test")}
    if files["train"] is None:
        raise UserError(f"There is no train.txt or train.csv in {root}: name the list with --train-list, {HOW}.")
    parts = _parts(files["train"], "train")
    for part in ("meta", "test"):
        file = files[part]
        if file is not None:
            parts[part] = _parts(file, part)[part]
    if "test" not in parts:
        raise UserError(
            f"There are no test images: add a column split to {files['train']}, put a test.txt or val.txt beside it, or name "
            "a list with --test-list."
        )
    classes = _classes(root, parts)
    splits = {name: _split(root, part, classes) for name, part in parts.items()}
    return Source("list", classes, splits["train"], splits["test"], mean=MEAN, std=STD, meta=splits.get("meta"))


def read_meta(config: DataConfig, classes: list[str]) -> Split:
    """Read ``config.meta_list`` as the meta-set of any data set of files; paths as in the data set's own root.

    Raises:
        UserError: it cannot be read, or names a class that is not among ``classes``.
    """
    root = Path(os.path.expanduser(config.data_root or "."))
    file = _find(root, "meta", config.meta_list)
    assert file is not None
    return _split(root, _parts(file, "meta")["meta"], classes)


def _find(root: Path, part: str, named: str | None) -> Path | None:
    """Return the list of ``part``: the one that is named, from here or from the root, or one by its usual name."""
    if named is not None:
        for path in (Path(os.path.expanduser(named)), root / named):
            if path.is_file():
                return path
        raise UserError(f"There is no list {named}: check --{part}-list.")
    return next((root / name for name in DEFAULTS[part] if (root / name).is_file()), None)


def _parts(file: Path, wanted: str) -> dict[str, _Part]:
    """Return the parts that a column split in ``file`` tells apart, ``wanted`` among them; without one, all as ``wanted``."""
    if file.suffix.lower() != ".csv":
        return {wanted: _Part(file, *read_list(file), None)}
    table = read_csv(file)
    if not table.parts:
        return {wanted: _numbered(_Part(file, table.paths, table.labels, table.names))}
    parts = {}
    for number, split in enumerate(table.parts):
        rows = np.flatnonzero(table.splits == number)
        name = "test" if split == "val" and "test" not in table.parts else split
        if name == "val":
            warnings.warn(f"{file} has both val and test: its val images are not used.", UserWarning, stacklevel=4)
        else:
            parts[name] = _numbered(_Part(file, table.paths.select(rows), table.labels[rows], table.names))
    if wanted not in parts:
        raise UserError(f"The column split of {file} holds no {wanted}: mark its images with it, or drop the column.")
    return parts


def _numbered(part: _Part) -> _Part:
    """Return ``part`` with class numbers where its labels are written as such."""
    assert part.names is not None
    others = [name for name in part.names if not (name.isdecimal() and len(name) < 10)]
    if others:
        if all(NUMBER.fullmatch(name) for name in part.names):  # as names, -1 and 1.0 would train without a word
            raise UserError(f"{part.file} has the label {others[0]!r}, and class numbers are 0, 1, 2, ...: correct it.")
        return part
    return part._replace(labels=np.array([int(name) for name in part.names], dtype=np.int64)[part.labels], names=None)


def _classes(root: Path, parts: dict[str, _Part]) -> list[str]:
    given = read_names(root / "classes.txt") if (root / "classes.txt").is_file() else []
    named = [part for part in parts.values() if part.names is not None]
    if given or not named:
        count = number_of_classes((part.labels for part in parts.values() if part.names is None), given)
        return given or [str(number) for number in range(count)]
    for part in parts.values():
        if part.names is None:
            raise UserError(f"The labels of {part.file} are numbers and those of {named[0].file} names: write them alike.")
    return sorted({part.names[label] for part in named if part.names is not None for label in np.unique(part.labels)})


def _split(root: Path, part: _Part, classes: list[str]) -> Split:
    labels = part.labels
    if part.names is not None:
        numbers = {name: number for number, name in enumerate(classes)}
        unknown = [part.names[label] for label in np.unique(labels) if part.names[label] not in numbers]
        if unknown:
            raise UserError(f"{part.file} has the label {unknown[0]!r}, which is no class of the data set: correct it.")
        labels = np.array([numbers.get(name, -1) for name in part.names], dtype=np.int64)[labels]
    return Split(images_below(root, part.paths), torch.from_numpy(labels))
