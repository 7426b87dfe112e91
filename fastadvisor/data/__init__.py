"""Data sets, the label and long-tail protocols, and loaders. See README.md in this folder."""

from fastadvisor.data.augment import Augmentation, normalize
from fastadvisor.data.images import ArrayImages, FileImages, Images
from fastadvisor.data.loaders import EvaluationLoader, Loader, Loaders, build_loaders, build_test_loader, into_memory, stage
from fastadvisor.data.loaders.resident import ResidentImages, ResidentLoader
from fastadvisor.data.protocol import prepare
from fastadvisor.data.readers import READERS, load_source
from fastadvisor.data.types import Batch, Source, Split, TrainingData

__all__ = [
    "READERS",
    "ArrayImages",
    "Augmentation",
    "Batch",
    "EvaluationLoader",
    "FileImages",
    "Images",
    "Loader",
    "Loaders",
    "ResidentImages",
    "ResidentLoader",
    "Source",
    "Split",
    "TrainingData",
    "build_loaders",
    "build_test_loader",
    "into_memory",
    "load_source",
    "normalize",
    "prepare",
    "stage",
]
