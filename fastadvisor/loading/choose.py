"""Which loader a run gets, and why; and images decoded into memory for the resident one."""

from dataclasses import replace

import numpy as np
import torch

from fastadvisor.config import Config, LoaderConfig
from fastadvisor.datasets.images import ArrayImages, Images
from fastadvisor.datasets.types import Source, Split, TrainingData
from fastadvisor.errors import UserError
from fastadvisor.loading.backends import dali
from fastadvisor.loading.decode import available_memory, choose_side, decode_all
from fastadvisor.loading.geometry import Geometry
from fastadvisor.loading.resized_cache import copied

RESIDENT_SHARE, RESIDENT_BYTES = 0.25, 8 * 10**9
"""--loader auto keeps images in memory that take this share of what is free at most, and this much at most."""


def geometry_of(config: LoaderConfig, data: Source | TrainingData) -> Geometry:
    """Return how images become batches; where nothing says their size, it is chosen from them.

    Raises:
        UserError: a crop larger than what it is cut out of.
    """
    return Geometry.of(config, data.image_size or choose_side(_parts(data)[0]))


def choose(config: LoaderConfig, data: Source | TrainingData, size: int, device: torch.device) -> tuple[str, str]:
    """Return the loader's name and the reason, for images of ``size`` pixels.

    Raises:
        UserError: a loader that is not installed, or cannot do what is asked.
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
    if all(isinstance(part, ArrayImages) for part in _parts(data)):
        return "resident", "all images are in memory"
    if needed <= RESIDENT_BYTES and (free is None or needed <= RESIDENT_SHARE * free):
        return "resident", f"{needed / 1e9:.1f} GB of images fit in memory"
    return name, f"{needed / 1e9:.1f} GB of images are too much to keep; {how}"


def stage(source: Source, config: Config, device: torch.device) -> Source:
    """Bring the images of ``source`` near: small copies in place of large ones (--cache-size), into memory if they fit.

    Raises:
        UserError: as :func:`fastadvisor.loading.resized_cache.copied` and :func:`into_memory`.
    """
    if config.cache_size is not None:
        geometry = geometry_of(config, replace(source, image_size=config.image_size or source.image_size))
        train, test = copied(source.train, "training", config, geometry), copied(source.test, "test", config, geometry)
        meta = None if source.meta is None else copied(source.meta, "meta", config, geometry)
        val = None if source.val is None else copied(source.val, "val", config, geometry)
        source = replace(source, train=train, test=test, meta=meta, val=val, image_size=geometry.size)
    return into_memory(source, config, device)


def into_memory(source: Source, config: Config, device: torch.device) -> Source:
    """Return ``source`` with its images decoded, if the loader is the resident one; else as it is.

    Args:
        source: as a reader gives it.
        config: of the run.
        device: that the run trains on.

    Raises:
        UserError: too little memory.
    """
    sized = replace(source, image_size=config.image_size or source.image_size)
    geometry = geometry_of(config, sized)
    if choose(config, sized, geometry.size, device)[0] != "resident":
        return source
    needed, available = memory_needed(source, geometry.size), available_memory()
    if source.meta is not None and not source.meta_drawn:  # joining both holds them twice for a moment
        needed += (len(source.train) + len(source.meta)) * geometry.size**2 * 3
    on_disk = any(not isinstance(part, ArrayImages) for part in _parts(source))
    if on_disk and available is not None and needed > available:
        raise UserError(
            f"The images of {source.name} at {geometry.size} x {geometry.size} need {needed / 1e9:.1f} GB of memory and "
            f"{available / 1e9:.1f} GB are free: use --loader torch or dali, or choose a smaller side with --image-size."
        )
    train, test = decode_split(source.train, geometry), decode_split(source.test, geometry)
    meta = None if source.meta is None else decode_split(source.meta, geometry)
    val = None if source.val is None else decode_split(source.val, geometry)
    return replace(source, train=train, test=test, meta=meta, val=val, image_size=geometry.size)


def decode_split(split: Split, geometry: Geometry) -> Split:
    """Return ``split`` in memory, as in testing; what cannot be read is in ``ArrayImages.bad``."""
    if isinstance(split.images, ArrayImages):
        return split
    pixels, reasons = decode_all(split.images, np.arange(len(split)), geometry)
    return Split(ArrayImages(pixels, split.images, reasons), split.labels)


def memory_needed(data: Source | TrainingData, size: int) -> int:
    """Return the bytes that all images take at ``size`` pixels."""
    return sum(len(part) for part in _parts(data)) * size * size * 3


def _parts(data: Source | TrainingData) -> list[Images]:
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
