"""WebVision 1.0 (Li et al. 2017): images that Google found for the classes of ImageNet, and the subset called mini."""

from pathlib import Path

import numpy as np
import torch

from fastadvisor.config import DataConfig
from fastadvisor.datasets.readers.imagefolder import MEAN, STD
from fastadvisor.datasets.readers.lists import Listed, count_classes, read_list, read_names
from fastadvisor.datasets.readers.locate import find_file, find_images, find_root
from fastadvisor.datasets.types import Source, Split
from fastadvisor.errors import UserError

SIDE = 224
TRAIN, VAL = "train_filelist_google.txt", "val_filelist.txt"
MINI = 50
"""The variant mini consists of the first so many classes."""


def read(config: DataConfig) -> Source:
    """Read WebVision from ``config.data_root``; the test images are those of the validation list.

    It brings no meta-set: one is held out of the training images, whose labels are noisy, unless ``config.meta_list`` names
    clean ones.

    Raises:
        UserError: a list is missing or cannot be read, or its images cannot be found.
    """
    root = find_root(config, "info/train_filelist_google.txt, info/val_filelist.txt and the images")
    train, test = (read_list(find_file(root, name)) for name in (TRAIN, VAL))
    names = _read_class_names(root_file) if (root_file := root / "info" / "synsets.txt").is_file() else []
    count = count_classes((train.labels, test.labels), names)
    if config.variant == "mini":
        count = min(count, MINI)
        train, test = (_keep_first_classes(part, count) for part in (train, test))
    classes = names[:count] or [str(number) for number in range(count)]
    return Source(
        "webvision",
        classes,
        Split(find_images(root, train.paths, "train", TRAIN), torch.from_numpy(train.labels)),
        Split(find_images(root, test.paths, "val", VAL, ["val_images_256", "val_images"]), torch.from_numpy(test.labels)),
        mean=MEAN,
        std=STD,
        image_size=SIDE,
    )


def _keep_first_classes(part: Listed, count: int) -> Listed:
    rows = np.flatnonzero(part.labels < count)
    if not len(rows):
        raise UserError(f"--variant mini takes the classes 0 to {count - 1}, and the lists have none of them: drop it.")
    return Listed(part.paths.select(rows), part.labels[rows])


def _read_class_names(synsets: Path) -> list[str]:
    """Return the first name in each line such as ``n01440764 tench, Tinca tinca``, with the synset if it is not unique."""
    lines = [line.partition(" ") for line in read_names(synsets)]
    words = [rest.partition(",")[0].strip() or synset for synset, _, rest in lines]
    return [word if words.count(word) == 1 else f"{word} ({synset})" for word, (synset, _, _) in zip(words, lines, strict=True)]
