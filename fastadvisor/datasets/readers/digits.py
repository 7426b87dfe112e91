"""scikit-learn's handwritten digits: the default data set, which is part of scikit-learn and needs no download."""

import numpy as np
import torch

from fastadvisor.config import DataConfig
from fastadvisor.datasets.images import ArrayImages
from fastadvisor.datasets.types import Source, Split

TRAINING_POOL = 1300
"""Images that are not test images: 1,200 to train on and 10 meta images of each class (method.md, "What was seen")."""


def read(config: DataConfig) -> Source:
    """Return the 1,797 digits as (N, 8, 8, 3) uint8: 1,300 to train on and 497 to test on, always the same ones."""
    from sklearn.datasets import load_digits  # takes a second to import, and only this reader needs it

    bunch = load_digits()
    # The scans hold values from 0 to 16, and 16 * 16 would overflow a byte.
    gray = np.minimum(bunch.images * 16, 255).astype(np.uint8)
    images = torch.from_numpy(np.repeat(gray[..., None], 3, axis=3))
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(labels)))
    train, test = order[:TRAINING_POOL], order[TRAINING_POOL:]
    pool = gray[train.numpy()] / 255.0
    mean, std = float(pool.mean()), float(pool.std())
    return Source(
        name="digits",
        classes=[str(digit) for digit in range(10)],
        train=Split(ArrayImages(images[train]), labels[train]),
        test=Split(ArrayImages(images[test]), labels[test]),
        mean=(mean, mean, mean),
        std=(std, std, std),
        image_size=images.shape[1],
    )
