"""Cache the images of a data set before a run: small copies on disk (``--cache-size``), and pixels in memory if they fit."""

from dataclasses import replace

import numpy as np
import torch

from fastadvisor.config import Config
from fastadvisor.datasets.images import ArrayImages
from fastadvisor.datasets.types import Source, Split
from fastadvisor.errors import UserError
from fastadvisor.loading.choose import choose_geometry, choose_loader, image_tables, memory_needed
from fastadvisor.loading.decode import available_memory, decode_all
from fastadvisor.loading.geometry import Geometry
from fastadvisor.loading.resized_cache import cache_resized


def cache_images(source: Source, config: Config, device: torch.device) -> Source:
    """Return ``source`` with small copies in place of large images (--cache-size), decoded into memory if they fit.

    Raises:
        UserError: as in :func:`fastadvisor.loading.resized_cache.cache_resized` and :func:`decode_into_memory`.
    """
    if config.cache_size is not None:
        geometry = choose_geometry(config, replace(source, image_size=config.image_size or source.image_size))
        train, test = (
            cache_resized(source.train, "training", config, geometry),
            cache_resized(source.test, "test", config, geometry),
        )
        meta = None if source.meta is None else cache_resized(source.meta, "meta", config, geometry)
        val = None if source.val is None else cache_resized(source.val, "val", config, geometry)
        source = replace(source, train=train, test=test, meta=meta, val=val, image_size=geometry.size)
    return decode_into_memory(source, config, device)


def decode_into_memory(source: Source, config: Config, device: torch.device) -> Source:
    """Return ``source`` with its images decoded if the run gets the resident loader, and unchanged otherwise.

    Args:
        source: the data set, as a reader returns it.
        config: the settings of the run.
        device: the device that the run trains on.

    Raises:
        UserError: there is too little memory.
    """
    sized = replace(source, image_size=config.image_size or source.image_size)
    geometry = choose_geometry(config, sized)
    if choose_loader(config, sized, geometry.size, device)[0] != "resident":
        return source
    needed, available = memory_needed(source, geometry.size), available_memory()
    if source.meta is not None and not source.meta_drawn:  # while they are joined, both are held twice
        needed += (len(source.train) + len(source.meta)) * geometry.size**2 * 3
    on_disk = any(not isinstance(part, ArrayImages) for part in image_tables(source))
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
    """Return ``split`` decoded into memory, cropped as for testing; ``ArrayImages.bad`` lists images that cannot be read."""
    if isinstance(split.images, ArrayImages):
        return split
    pixels, reasons = decode_all(split.images, np.arange(len(split)), geometry)
    return Split(ArrayImages(pixels, split.images, reasons), split.labels)
