"""Clothing1M (Xiao et al. 2015): a million images labelled by the shops that they come from, and a few with verified labels."""

from pathlib import Path

import numpy as np
import torch

from fastadvisor.config import DataConfig
from fastadvisor.datasets.paths import Ints, PathTable
from fastadvisor.datasets.readers.lists import Listed, read_class_names, read_keys, read_list
from fastadvisor.datasets.readers.locate import find_file, find_images, find_root
from fastadvisor.datasets.types import Source, Split
from fastadvisor.errors import UserError

MEAN, STD = (0.6959, 0.6537, 0.6371), (0.3113, 0.3192, 0.3214)
SIDE = 224
FOLDER = "images"


def read(config: DataConfig) -> Source:
    """Read Clothing1M from ``config.data_root``: annotations in it or in ``annotations/``; paths begin with ``images/`` or not.

    The training images are those of ``noisy_train_key_list.txt`` and, in the variant clean-and-noisy, after them those of
    ``clean_train_key_list.txt`` with their verified labels; an image that is in both is taken once, with the verified
    label. The meta-set is all of ``clean_val`` (method.md), and the test images are ``clean_test``.

    Raises:
        UserError: an annotation is missing or cannot be read, a key has no label, or the images cannot be found.
    """
    root = find_root(config, "category_names_eng.txt, the lists of labels and keys, and images/")
    classes = read_class_names(find_file(root, "category_names_eng.txt"))
    noisy, clean = (_read_labels(root, f"{kind}_label_kv.txt") for kind in ("noisy", "clean"))
    train = _read_listed(root, "noisy_train_key_list.txt", noisy, "noisy_label_kv.txt")
    if config.variant == "clean-and-noisy":
        verified = _read_listed(root, "clean_train_key_list.txt", clean, "clean_label_kv.txt")
        only_noisy = np.flatnonzero(verified.paths.find(train.paths) < 0)
        train = Listed(
            PathTable.concatenate([train.paths.select(only_noisy), verified.paths]),
            np.concatenate([train.labels[only_noisy], verified.labels]),
        )
    meta, test = (_read_listed(root, f"clean_{part}_key_list.txt", clean, "clean_label_kv.txt") for part in ("val", "test"))
    splits = {
        name: Split(find_images(root, part.paths, name, file, [FOLDER]), torch.from_numpy(part.labels))
        for name, part, file in (
            ("train", train, "noisy_train_key_list.txt"),
            ("test", test, "clean_test_key_list.txt"),
            ("meta", meta, "clean_val_key_list.txt"),
        )
    }
    return Source(
        "clothing1m", classes, splits["train"], splits["test"], mean=MEAN, std=STD, meta=splits["meta"], image_size=SIDE
    )


def _read_labels(root: Path, name: str) -> Listed:
    paths, labels = read_list(find_file(root, name))
    return Listed(paths.remove_prefix(f"{FOLDER}/"), labels)


def _read_listed(root: Path, name: str, known: Listed, source: str) -> Listed:
    """Return the keys of the list ``name`` with their labels, which are looked up in ``known``."""
    file = find_file(root, name)
    keys = read_keys(file).remove_prefix(f"{FOLDER}/")
    rows: Ints = known.paths.find(keys)
    missing = np.flatnonzero(rows < 0)
    if len(missing):
        raise UserError(
            f"{file} lists {keys[int(missing[0])]}, which has no label in {source} ({len(missing)} of {len(keys)} have none): "
            "take both files from the same release."
        )
    return Listed(keys, known.labels[rows])
