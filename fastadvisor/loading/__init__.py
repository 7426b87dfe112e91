"""Loading: how the images of a data set become batches. See README.md in this folder."""

from fastadvisor.loading.augment import Augmentation, normalize
from fastadvisor.loading.backends.resident import ResidentImages, ResidentLoader
from fastadvisor.loading.batch import Batch
from fastadvisor.loading.build import build_loaders, build_test_loader
from fastadvisor.loading.loader import EvaluationLoader, Loader, Loaders
from fastadvisor.loading.memory import cache_images, decode_into_memory

__all__ = [
    "Augmentation",
    "Batch",
    "EvaluationLoader",
    "Loader",
    "Loaders",
    "ResidentImages",
    "ResidentLoader",
    "build_loaders",
    "build_test_loader",
    "cache_images",
    "decode_into_memory",
    "normalize",
]
