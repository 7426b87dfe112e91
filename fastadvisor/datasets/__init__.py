"""Data sets: reading them from disk, and the protocols that turn one into training data. See README.md in this folder."""

from fastadvisor.datasets.images import ArrayImages, FileImages, Images
from fastadvisor.datasets.protocol import prepare
from fastadvisor.datasets.readers import READERS, load_source
from fastadvisor.datasets.types import Source, Split, TrainingData

__all__ = [
    "READERS",
    "ArrayImages",
    "FileImages",
    "Images",
    "Source",
    "Split",
    "TrainingData",
    "load_source",
    "prepare",
]
