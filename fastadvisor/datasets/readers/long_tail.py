"""ImageNet-LT and Places-LT: the published lists, in the root or directly below; the meta-set is drawn from the val list."""

from itertools import takewhile

import numpy as np
import torch

from fastadvisor.config import DataConfig
from fastadvisor.datasets.readers.imagefolder import MEAN, STD
from fastadvisor.datasets.readers.lists import Listed, count_classes, read_list
from fastadvisor.datasets.readers.locate import find_file, find_images, find_root
from fastadvisor.datasets.types import Source, Split

LISTS = {"imagenet-lt": "ImageNet_LT", "places-lt": "Places_LT"}
SIDE = 224


def read(config: DataConfig) -> Source:
    """Read ``config.dataset`` (imagenet-lt or places-lt) from ``config.data_root`` (Liu et al. 2019).

    Raises:
        UserError: a list is missing or cannot be read, or its images cannot be found.
    """
    lists = LISTS[config.dataset]
    root = find_root(config, f"{lists}_train.txt, {lists}_val.txt, {lists}_test.txt and the images")
    files = {part: find_file(root, f"{lists}_{part}.txt") for part in ("train", "val", "test")}
    listed = {part: read_list(file) for part, file in files.items()}
    splits = {
        part: Split(find_images(root, paths, part, files[part], anywhere=True), torch.from_numpy(labels))
        for part, (paths, labels) in listed.items()
    }
    return Source(
        config.dataset,
        _name_classes(listed["train"], count_classes(labels for _, labels in listed.values())),
        splits["train"],
        splits["test"],
        mean=MEAN,
        std=STD,
        meta=splits["val"],
        meta_drawn=True,
        image_size=SIDE,
    )


def _name_classes(train: Listed, count: int) -> list[str]:
    """Name each class by the folders of its first image without those that all share, or by its number if that fails."""
    folders: list[list[str]] = [[] for _ in range(count)]
    labels, rows = np.unique(train.labels, return_index=True)
    for label, row in zip(labels.tolist(), rows.tolist(), strict=True):
        folders[label] = train.paths[row].split("/")[:-1]
    levels = zip(*(parts for parts in folders if parts), strict=False)
    common = len(list(takewhile(lambda level: len(set(level)) == 1, levels)))
    # Places sorts its classes into folders by their first letter, which is not part of the name.
    names = ["/".join(part for part in parts[common:] if len(part) > 1) for parts in folders]
    return [name if name and names.count(name) == 1 else str(number) for number, name in enumerate(names)]
