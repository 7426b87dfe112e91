"""Pillow's part: any image file to RGB, and whole data sets to one tensor, in threads (it releases the GIL as it decodes)."""

import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from fastadvisor.data.geometry import Geometry
from fastadvisor.data.images import Images
from fastadvisor.data.paths import Ints

LARGEST_SIDE = 224
"""Cap on the side chosen for the user: what the usual networks were designed for."""

SAMPLE = 200
"""Images whose headers are read to choose the side."""


class Unreadable(Exception):
    """An image that cannot be read, with the reason in a few words."""


def read(images: Images, row: int) -> bytes:
    """Return the encoded image.

    Raises:
        Unreadable: missing, empty, or the file system fails.
    """
    try:
        data = images.encoded(row)
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from None
    if not data:
        raise Unreadable("empty file")
    return data


def decode_rgb(data: bytes) -> Image.Image:
    """Return an image of any format that Pillow knows upright by its EXIF tag and in RGB: alpha dropped, 16 bits to 8.

    Raises:
        Unreadable: cut short, damaged, or no image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _rgb(ImageOps.exif_transpose(image))
    except MemoryError:
        raise
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError and more on damaged files.
    except Exception as error:
        reason = "not an image" if "cannot identify" in str(error) else "cut short" if "truncated" in str(error) else "damaged"
        raise Unreadable(reason) from None


def evaluation_pixels(image: Image.Image, geometry: Geometry) -> NDArray[np.uint8]:
    """Return an RGB image as the network sees it in testing, (S, S, 3) uint8; one that has this size keeps its pixels."""
    side = geometry.size
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box=geometry.test_box(*image.size)))


def choose_side(images: Images) -> int:
    """Return the median of the shorter sides over up to 200 images spread over ``images``, at most 224."""
    step = max(1, len(images) // SAMPLE)
    sides = [side for row in range(0, len(images), step)[:SAMPLE] if (side := _shorter_side(images, row))]
    # No readable header at all: any side will do, decoding names the broken files.
    return min(LARGEST_SIDE, int(median(sides))) if sides else 1


def decode_all(images: Images, rows: Ints, geometry: Geometry) -> tuple[Tensor, dict[int, str]]:
    """Decode the images of ``rows`` as in testing.

    Returns:
        (len(rows), S, S, 3) uint8, undefined where an image could not be read; and the reasons by row.
    """
    out = np.empty((len(rows), geometry.size, geometry.size, 3), dtype=np.uint8)

    def work(place: int) -> str | None:
        try:
            out[place] = evaluation_pixels(decode_rgb(read(images, int(rows[place]))), geometry)
        except Unreadable as reason:
            return str(reason)
        return None

    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        reasons = list(pool.map(work, range(len(rows))))
    return torch.from_numpy(out), {int(rows[place]): reason for place, reason in enumerate(reasons) if reason is not None}


def available_memory() -> int | None:
    """Return the bytes of main memory that can still be had, or None where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _rgb(image: Image.Image) -> Image.Image:
    """Return ``image`` in RGB, alpha dropped."""
    if image.mode.startswith("I"):  # 16-bit gray: PIL's own conversion would clip all above 255 to white
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:  # PIL warns when such a palette goes to RGB directly
        image = image.convert("RGBA")
    return image.convert("RGB")


def _shorter_side(images: Images, row: int) -> int | None:
    try:
        with Image.open(io.BytesIO(images.encoded(row))) as image:  # decodes the header only
            return min(image.size)
    except Exception:  # as in decode_rgb, which reports the file
        return None
