"""Food-101N (Lee et al. 2018): images from the web for the classes of Food-101; some of their labels have been verified."""

import warnings
from pathlib import Path

import numpy as np
import torch

from fastadvisor.config import DataConfig
from fastadvisor.datasets.paths import PathTable
from fastadvisor.datasets.readers.imagefolder import MEAN, STD
from fastadvisor.datasets.readers.lists import read_class_names, read_names
from fastadvisor.datasets.readers.locate import find_images, find_root
from fastadvisor.datasets.types import Source, Split
from fastadvisor.errors import UserError

SIDE = 224
CLEAN_TEST = "food-101"


def read(config: DataConfig) -> Source:
    """Read Food-101N from ``config.data_root``.

    The meta-set consists of all images whose label ``meta/verified_train.tsv`` calls right; they are taken out of the training
    images. The test images are those of Food-101, from ``food-101/`` in the root or beside it. If there is no such folder, the
    images that ``meta/verified_val.tsv`` calls right are taken out of the training images as well and tested on; a warning
    says so.

    Raises:
        UserError: a list is missing or cannot be read, or names a class that is not in ``meta/classes.txt``.
    """
    root = find_root(config, "meta/classes.txt, meta/imagelist.tsv, meta/verified_train.tsv and images/")
    classes = [name for name in read_class_names(_find_list(root, "classes.txt")) if name != "class_name"]
    keys = read_names(_find_list(root, "imagelist.tsv"))[1:]
    verified = {part: _read_verified(_find_list(root, f"verified_{part}.tsv")) for part in ("train", "val")}
    held_out = set(verified["train"])
    clean = next((path for path in (root / CLEAN_TEST, root.parent / CLEAN_TEST) if (path / "meta/test.txt").is_file()), None)
    if clean is None:
        warnings.warn(
            f"There is no {CLEAN_TEST}/ in {root} or beside it: the verified validation images stand in for Food-101's test "
            "images, and published figures are on those.",
            UserWarning,
            stacklevel=3,
        )
        held_out |= set(verified["val"])
        test = _make_split(root, "test", "meta/verified_val.tsv", verified["val"], classes)
    else:
        test = _make_split(
            clean, "test", "meta/test.txt", [f"{key}.jpg" for key in read_names(clean / "meta/test.txt")], classes
        )
    return Source(
        "food101n",
        classes,
        _make_split(root, "train", "meta/imagelist.tsv", [key for key in keys if key not in held_out], classes),
        test,
        mean=MEAN,
        std=STD,
        meta=_make_split(root, "meta", "meta/verified_train.tsv", verified["train"], classes),
        image_size=SIDE,
    )


def _find_list(root: Path, name: str) -> Path:
    path = root / "meta" / name
    if not path.is_file():
        raise UserError(f"There is no {path}: --data-root must be the folder of Food-101N, with meta/ and images/ in it.")
    return path


def _read_verified(path: Path) -> list[str]:
    """Return the keys whose label a list calls right; its rows, after a header, are ``class/key``, a tab, and 0 or 1."""
    keys = []
    for number, line in enumerate(read_names(path)[1:], start=2):
        key, tab, verdict = line.partition("\t")
        if not tab or verdict.strip() not in ("0", "1"):
            raise UserError(f"{path}, row {number}: {line[:100]!r} is not a key, a tab and 0 or 1: correct it.")
        if verdict.strip() == "1":
            keys.append(key)
    return keys


def _make_split(root: Path, part: str, file: str, keys: list[str], classes: list[str]) -> Split:
    """Return the images of ``keys``, those entries of the list ``file`` in ``root`` that are used for this part."""
    if not keys:
        raise UserError(f"{root / file} leaves no images to use: fetch the data set again.")
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers.get(key.partition("/")[0], -1) for key in keys], dtype=np.int64)
    unknown = np.flatnonzero(labels < 0)
    if len(unknown):
        raise UserError(
            f"The image {keys[int(unknown[0])]} is of a class that is not in meta/classes.txt: correct one of them."
        )
    return Split(find_images(root, PathTable.of(keys), part, root / file, ["images"]), torch.from_numpy(labels))
