"""A digest of the data of a run, which is compared when the run is resumed."""

import hashlib
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastadvisor.datasets.duplicates import read_digest
from fastadvisor.datasets.images import ArrayImages, Images
from fastadvisor.datasets.types import TrainingData

READ = 32
"""Number of files of each part whose content is included: a file may be replaced by another of the same name and size."""


def fingerprint(data: TrainingData) -> str:
    """Return a digest of what a run learns from and is tested on, as 32 hexadecimal digits.

    It covers the names of the classes; the names and sizes of all files and the content of some, or all pixels of images in
    memory; the labels after corruption; and which samples are in the training set and in the meta-set.
    """
    digest = hashlib.sha256()
    digest.update(os.fsencode("\0".join(data.classes)))
    rows = np.unique(np.concatenate([data.train_ids.cpu().numpy(), data.meta_ids.cpu().numpy()]))
    _add_images(digest, data.images, rows)
    tested = [data.test, *([] if data.val is None else [data.val])]
    for split in tested:
        _add_images(digest, split.images, np.arange(len(split)))
    labels = (data.labels[torch.from_numpy(rows)], data.train_ids, data.meta_ids, *(split.labels for split in tested))
    for tensor in labels:
        _add(digest, tensor)
    return digest.hexdigest()[:32]


def _add_images(digest: Any, images: Images, rows: Any) -> None:
    if isinstance(images, ArrayImages):
        for start in range(0, len(rows), 4096):  # in pieces, so that the images are never copied as a whole
            _add(digest, images.pixels[torch.from_numpy(rows[start : start + 4096])])
        return
    digest.update(os.fsencode("\0".join(images.name(row).rsplit("/", 1)[-1] for row in rows.tolist())))
    digest.update(images.sizes(rows).tobytes())
    for at in np.unique(np.linspace(0, len(rows) - 1, READ, dtype=np.int64)).tolist() if len(rows) else ():
        digest.update(read_digest(images, int(rows[at])) or b"")


def _add(digest: Any, tensor: Tensor) -> None:
    digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
