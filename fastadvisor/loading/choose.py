"""Choose the loader of a run, and give the reason."""

import torch

from fastadvisor.config import LoaderConfig
from fastadvisor.datasets.images import ArrayImages, Images
from fastadvisor.datasets.types import Source, TrainingData
from fastadvisor.errors import UserError
from fastadvisor.loading.backends import dali
from fastadvisor.loading.decode import available_memory, choose_side
from fastadvisor.loading.geometry import Geometry

RESIDENT_SHARE, RESIDENT_BYTES = 0.25, 8 * 10**9
"""--loader auto keeps images in memory if they need at most this fraction of the free memory and at most so many bytes."""


def choose_geometry(config: LoaderConfig, data: Source | TrainingData) -> Geometry:
    """Return how images are resized and cropped; if neither user nor data set gives a size, the images decide it.

    Raises:
        UserError: the crop is larger than the resized image.
    """
    return Geometry.of(config, data.image_size or choose_side(image_tables(data)[0]))


def choose_loader(config: LoaderConfig, data: Source | TrainingData, size: int, device: torch.device) -> tuple[str, str]:
    """Return the name of the loader and the reason for it, for images of ``size`` × ``size`` pixels.

    Raises:
        UserError: the loader that was asked for is not installed, or cannot do what the settings ask.
    """
    if config.loader == "resident" and config.crop != "pad":
        raise UserError(f"--loader resident crops by padding only, and --crop is {config.crop}: use --loader torch or dali.")
    if config.loader == "dali" and not dali.available():
        raise UserError("--loader dali needs NVIDIA DALI: pip install nvidia-dali-cuda130 (or the one for your CUDA).")
    if config.loader != "auto":
        return config.loader, "as asked for"
    where = "on the GPU" if device.type == "cuda" else "in threads, quicker than worker processes"
    name, how = ("dali", f"it decodes {where}") if dali.available() else ("torch", "NVIDIA DALI is not installed")
    if config.crop != "pad":
        return name, f"--crop {config.crop} works on the files; {how}"
    needed, free = memory_needed(data, size), _free_memory(device)
    if all(isinstance(part, ArrayImages) for part in image_tables(data)):
        return "resident", "all images are in memory"
    if needed <= RESIDENT_BYTES and (free is None or needed <= RESIDENT_SHARE * free):
        return "resident", f"{needed / 1e9:.1f} GB of images fit in memory"
    return name, f"{needed / 1e9:.1f} GB of images are too much to keep; {how}"


def memory_needed(data: Source | TrainingData, size: int) -> int:
    """Return the memory in bytes that all images need at ``size`` × ``size`` pixels."""
    return sum(len(part) for part in image_tables(data)) * size * size * 3


def image_tables(data: Source | TrainingData) -> list[Images]:
    """Return the images of every part that the data has."""
    val = [] if data.val is None else [data.val.images]
    if isinstance(data, TrainingData):
        return [data.images, data.test.images, *val]
    return [data.train.images, data.test.images, *([] if data.meta is None else [data.meta.images]), *val]


def _free_memory(device: torch.device) -> int | None:
    main = available_memory()
    if device.type != "cuda":
        return main
    on_device = int(torch.cuda.mem_get_info(device)[0])
    return on_device if main is None else min(main, on_device)
