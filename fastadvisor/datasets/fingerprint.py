"""A digest of the data of a run: a resumed run compares it with that of its first part."""

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
"""Files of a part whose content the fingerprint takes in: another picture may have the name and the size of the one before."""


def fingerprint(data: TrainingData) -> str:
    """Return a digest of what a run learns from and is tested on: names and sizes, and the content of some (of images in memory
    all pixels), labels after corruption, and which samples are for training and for the meta-set.
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
        for start in range(0, len(rows), 4096):  # not a second copy of all of them
            _add(digest, images.pixels[torch.from_numpy(rows[start : start + 4096])])
        return
    digest.update(os.fsencode("\0".join(images.name(row).rsplit("/", 1)[-1] for row in rows.tolist())))
    digest.update(images.sizes(rows).tobytes())
    for at in np.unique(np.linspace(0, len(rows) - 1, READ, dtype=np.int64)).tolist() if len(rows) else ():
        digest.update(read_digest(images, int(rows[at])) or b"")


def _add(digest: Any, tensor: Tensor) -> None:
    digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
