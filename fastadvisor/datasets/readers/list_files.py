"""Images named in list files: lines of ``path label``, or a CSV with ``path,label[,split]`` (formats.md)."""

import os
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastadvisor.config import DataConfig
from fastadvisor.datasets.class_labels import resolve_labels
from fastadvisor.datasets.images import FileImages
from fastadvisor.datasets.paths import Ints, PathTable
from fastadvisor.datasets.readers.imagefolder import MEAN, STD
from fastadvisor.datasets.readers.lists import count_classes, read_class_names, read_csv, read_list
from fastadvisor.datasets.readers.locate import find_images
from fastadvisor.datasets.types import Source, Split
from fastadvisor.errors import UserError

DEFAULTS: dict[str, tuple[str, ...]] = {
    "train": ("train.txt", "train.csv"),
    "meta": ("meta.txt", "meta.csv"),
    "test": ("test.txt", "test.csv"),
    "val": ("val.txt", "val.csv"),
}
"""The names under which the list of each part is looked for in the root."""

NUMBER = re.compile(r"[-+]?\d+(\.\d*)?")
HOW = "lines of 'path label', or a CSV with path,label[,split]"


class _Part(NamedTuple):
    file: Path
    paths: PathTable
    labels: Ints
    """(N,) int64, indices into ``names``."""
    names: list[str]
    """The distinct labels, as they are written."""


def read(config: DataConfig) -> Source:
    """Read the lists that ``config`` names.

    Paths in a list are relative to the root, or to the folder of their part in it. The root is ``config.data_root`` or, without
    that, the folder of the training list. Labels are class numbers, which the lines of ROOT/classes.txt name if there is such a
    file, or, in a CSV, names of classes, which are numbered in alphabetical order. If there are both test and val images, the
    best checkpoint is chosen by val.

    Raises:
        UserError: a list is missing or cannot be read, there are no test images, or some lists use numbers and others names.
    """
    if config.data_root is None and config.train_list is None:
        raise UserError(f"list needs --train-list FILE, {HOW}, or --data-root DIR with a train.txt or train.csv in it.")
    root = Path(config.data_root or os.path.dirname(config.train_list or "") or ".")
    named = {"train": config.train_list, "meta": config.meta_list, "test": config.test_list, "val": None}
    files = {part: _find_list(root, part, name) for part, name in named.items()}
    if files["train"] is None:
        raise UserError(f"There is no train.txt or train.csv in {root}: name the list with --train-list, {HOW}.")
    parts, unread = _read_parts(files["train"], "train"), []
    for part in ("meta", "test", "val"):
        file = files[part]
        if file is not None and part in parts and named[part] is None:
            unread.append(f"The column split of {files['train']} has {part} images, so {file} is not read.")
        elif file is not None:
            parts[part] = _read_parts(file, part)[part]
    folders = {part: part for part in parts}
    if "test" not in parts and "val" in parts:
        parts["test"], folders["test"] = parts.pop("val"), "val"
    if "test" not in parts:
        raise UserError(
            f"There are no test images: add a column split to {files['train']}, put a test.txt or val.txt beside it, or name "
            "a list with --test-list."
        )
    classes, numbers, notes = _number_classes(root, parts)
    images = {"train": find_images(root, parts["train"].paths, "train", parts["train"].file)}
    for name in parts.keys() - {"train"}:  # meta images may be training images, with the same paths
        last = [images["train"].root] if name == "meta" else []
        images[name] = find_images(root, parts[name].paths, folders[name], parts[name].file, last=last)
    splits = {name: Split(images[name], torch.from_numpy(numbers[name])) for name in parts}
    meta, val = splits.get("meta"), splits.get("val")
    return Source(
        "list", classes, splits["train"], splits["test"], mean=MEAN, std=STD, meta=meta, val=val, notes=(*notes, *unread)
    )


def add_meta_list(source: Source, config: DataConfig) -> Source:
    """Return ``source`` with the images of ``config.meta_list`` as its meta-set.

    Paths in the list are relative to the root of the data set, to meta/ in it, or to the folder of the training images.

    Raises:
        UserError: the list cannot be read, or names a class that the data set does not have.
    """
    root = Path(config.data_root or ".")
    file = _find_list(root, "meta", config.meta_list)
    assert file is not None
    part = _read_parts(file, "meta")["meta"]
    train = source.train.images
    folders = [train.root.absolute()] if isinstance(train, FileImages) else []
    numbers, note = resolve_labels(part.names, source.classes, file)
    meta = Split(find_images(root, part.paths, "meta", file, folders), torch.from_numpy(numbers[part.labels]))
    return replace(source, meta=meta, meta_drawn=False, notes=(*source.notes, *([note] if note else [])))


def _find_list(root: Path, part: str, named: str | None) -> Path | None:
    """Return the list of ``part``: the named one, below the working directory or the root, or one of its usual name."""
    if named is not None:
        found = [path for path in dict.fromkeys((Path(named), root / named)) if path.is_file()]
        if len(found) > 1 and not found[0].samefile(found[1]):
            raise UserError(
                f"There are two lists {named}, here and in {root}: name the one that is meant in full, as in "
                f"--{part}-list {shlex.quote(str(found[1]))} or --{part}-list {shlex.quote(str(found[0].absolute()))}."
            )
        if found:
            return found[0]
        raise UserError(f"There is no list {named}: check --{part}-list.")
    return next((root / name for name in DEFAULTS[part] if (root / name).is_file()), None)


def _read_parts(file: Path, wanted: str) -> dict[str, _Part]:
    """Return the parts that the column split of ``file`` names; without that column, one part, ``wanted``, of all rows."""
    if file.suffix.lower() != ".csv":
        paths, labels = read_list(file)
        numbers, indices = np.unique(labels, return_inverse=True)
        return {wanted: _Part(file, paths, indices.reshape(-1), [str(number) for number in numbers.tolist()])}
    table = read_csv(file)
    if not table.parts:
        return {wanted: _Part(file, table.paths, table.labels, table.names)}
    parts = {}
    for number, name in enumerate(table.parts):
        rows = np.flatnonzero(table.splits == number)
        used, indices = np.unique(table.labels[rows], return_inverse=True)
        names = [table.names[label] for label in used.tolist()]
        parts[name] = _Part(file, table.paths.select(rows), indices.reshape(-1), names)
    if wanted == "test" and "test" not in parts and "val" in parts:
        parts["test"] = parts["val"]
    if wanted not in parts:
        raise UserError(f"The column split of {file} holds no {wanted}: mark its images with it, or drop the column.")
    return parts


def _number_classes(root: Path, parts: dict[str, _Part]) -> tuple[list[str], dict[str, Ints], tuple[str, ...]]:
    """Return the names of the classes, the class number of each image by part, and what to tell the user."""
    given = read_class_names(root / "classes.txt") if (root / "classes.txt").is_file() else []
    for part in parts.values():
        others = [name for name in part.names if not _is_number(name)]
        # Taken as names of classes, -1 and 1.0 would be trained on without any message.
        if others and all(NUMBER.fullmatch(name) for name in part.names) and not set(part.names) <= set(given):
            raise UserError(f"{part.file} has the label {others[0]!r}, and class numbers are 0, 1, 2, ...: correct it.")
    names = sorted({name for part in parts.values() for name in part.names})
    if given:
        where = " and ".join(dict.fromkeys(str(part.file) for part in parts.values()))
        files = {name: part.file for part in parts.values() for name in part.names}
        numbers, note = resolve_labels(names, given, where, lambda label: f" of {files[label]}")
        of_name = dict(zip(names, numbers.tolist(), strict=True))
        classes, notes = given, (note,) if note else ()
    elif all(_is_number(name) for name in names):
        of_name, notes = {name: int(name) for name in names}, ()
        counted = (np.array([of_name[name] for name in part.names], dtype=np.int64)[part.labels] for part in parts.values())
        classes = [str(number) for number in range(count_classes(counted))]
    else:
        by_name = next(part for part in parts.values() if not all(_is_number(name) for name in part.names))
        by_number = [
            part
            for part in parts.values()
            if all(_is_number(name) for name in part.names) and not set(part.names) <= set(by_name.names)
        ]
        if by_number:
            raise UserError(
                f"The labels of {by_number[0].file} are numbers and those of {by_name.file} names: write them alike."
            )
        of_name, classes, notes = {name: number for number, name in enumerate(names)}, names, ()
    found = {key: np.array([of_name[name] for name in part.names], dtype=np.int64)[part.labels] for key, part in parts.items()}
    return classes, found, notes


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) < 10
