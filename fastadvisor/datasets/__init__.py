"""What data sets are: where their images and labels lie, and what the protocols make of them. See README.md in this folder."""

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
