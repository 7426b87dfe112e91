"""Animal-10N (Song et al. 2019): ten animals, in five pairs that are easily confused; file names hold the labels."""

import os
from pathlib import Path

import numpy as np
import torch

from fastadvisor.config import DataConfig
from fastadvisor.datasets.images import FileImages
from fastadvisor.datasets.paths import PathTable
from fastadvisor.datasets.readers.imagefolder import MEAN, STD, PassedOver, image_files
from fastadvisor.datasets.readers.locate import find_root
from fastadvisor.datasets.types import Source, Split
from fastadvisor.errors import UserError

CLASSES = ("cat", "lynx", "wolf", "coyote", "cheetah", "jaguar", "chimpanzee", "orangutan", "hamster", "guinea pig")
SIDE = 64


def read(config: DataConfig) -> Source:
    """Read Animal-10N from ``config.data_root``, which holds ``training/`` and ``testing/`` or a folder with them.

    It brings no meta-set: one is held out of the training images, whose labels are noisy, unless ``config.meta_list`` names
    clean ones.

    Raises:
        UserError: a folder is missing, empty or cannot be read, or the name of a file has no label.
    """
    root = find_root(config, "training/ and testing/")
    depths = ("training", "*/training", "*/*/training")
    folder = next((path.parent for depth in depths for path in sorted(root.glob(depth))), None)
    if folder is None or not (folder / "testing").is_dir():
        raise UserError(f"{root} must hold training/ and testing/, as in Animal-10N's archive: check --data-root.")
    passed_over = PassedOver()
    train, test = (_read_split(folder / part, passed_over) for part in ("training", "testing"))
    notes = passed_over.notes()
    return Source("animal10n", list(CLASSES), train, test, mean=MEAN, std=STD, image_size=SIDE, notes=notes)


def _read_split(folder: Path, passed_over: PassedOver) -> Split:
    try:
        files = image_files(folder, folder, passed_over)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be read ({error.strerror}): check --data-root.") from None
    if not files:
        raise UserError(f"The folder {folder} holds no images: unpack the archive again.")
    labels = []
    for name in files:
        label = os.path.basename(name).partition("_")[0]
        if not (label.isdecimal() and int(label) < len(CLASSES)):
            raise UserError(f"{folder / name}: its name does not begin with a label, as in 3_1234.jpg (3: {CLASSES[3]}).")
        labels.append(int(label))
    return Split(FileImages(folder, PathTable.of(files)), torch.from_numpy(np.array(labels, dtype=np.int64)))
