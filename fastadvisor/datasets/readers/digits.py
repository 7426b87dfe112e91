"""scikit-learn's handwritten digits: the embedded default, which needs no download."""

import numpy as np
import torch

from fastadvisor.config import DataConfig
from fastadvisor.datasets.images import ArrayImages
from fastadvisor.datasets.types import Source, Split

TRAINING_POOL = 1300
"""Images that are not the test set: 1,200 to train on and 10 clean ones a class (method.md, "What was seen")."""


def read(config: DataConfig) -> Source:
    """Return the 1,797 digits as (N, 8, 8, 3) uint8: 1,300 to train on, 497 to test, split the same way always."""
    from sklearn.datasets import load_digits  # takes a second to import, and only this reader needs it

    bunch = load_digits()
    # The scans hold 0..16; the last step would overflow a byte.
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
