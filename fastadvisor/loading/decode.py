"""Decoding with Pillow: any image file to RGB, and whole data sets to one tensor, in threads (Pillow releases the GIL)."""

import errno
import io
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fastadvisor.datasets.images import Images
from fastadvisor.datasets.paths import Ints
from fastadvisor.errors import too_many_open_files
from fastadvisor.loading.geometry import Geometry

LARGEST_SIDE = 224
"""Largest side in pixels that is chosen for the user: the one that the usual networks were designed for."""

SAMPLE = 200
"""Number of images whose headers are read to choose the side."""


# Pillow warns of every image that has more than half the pixels of those it refuses.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

MEGAPIXELS = 178
"""Size of the largest image that Pillow opens: a small file may claim to hold more pixels than fit in memory."""

OTHER_FORMATS = (
    {b"II*\0": "a TIFF of a kind that is not read here", b"MM\0*": "a TIFF of a kind that is not read here"}
    | {
        b"ftyp" + brand: f"{name}, which is not read here"
        for brand, name in (
            (b"heic", "HEIC"),
            (b"heix", "HEIC"),
            (b"mif1", "HEIF"),
            (b"msf1", "HEIF"),
            (b"avif", "AVIF"),
            (b"avis", "AVIF"),
        )
    }
    | {b"<svg": "SVG, which is not read here", b"8BPS": "a Photoshop file, which is not read here"}
)
"""What a file that Pillow cannot open is, by its first bytes."""


class Unreadable(Exception):
    """An image cannot be read; the message is the reason in a few words."""


def read_encoded(images: Images, row: int) -> bytes:
    """Return the bytes of the encoded image.

    Raises:
        Unreadable: the file is missing or empty, or the file system fails.
        UserError: too many files are open, which is not the fault of this file.
    """
    try:
        data = images.encoded(row)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise too_many_open_files() from None
        raise Unreadable(error.strerror or str(error)) from None
    if not data:
        raise Unreadable("empty file")
    return data


def decode_rgb(data: bytes) -> Image.Image:
    """Decode an image of any format that Pillow knows, turned upright by its EXIF tag, to RGB.

    An alpha channel is dropped; values that are not bytes are scaled to bytes (:func:`_scale_to_bytes`).

    Raises:
        Unreadable: the file is truncated, damaged, too large, or not an image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            # Asked before turning, which forgets the format: gray images of more than 8 bits in PNG and PGM have 16.
            sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
            return _convert_to_rgb(ImageOps.exif_transpose(image), sixteen=sixteen)
    except (MemoryError, Unreadable):
        raise
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        size = "" if pixels is None else f" ({int(pixels[0]) // 10**6} megapixels)"
        raise Unreadable(f"too large{size}: at most {MEGAPIXELS} megapixels are read") from None
    except UnidentifiedImageError:
        raise Unreadable(_identify_format(data) or "not an image") from None
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError and more on damaged files.
    except Exception as error:
        raise Unreadable("cut short" if "truncated" in str(error) else "damaged") from None


def evaluation_pixels(image: Image.Image, geometry: Geometry) -> NDArray[np.uint8]:
    """Resize and crop an RGB image as for testing, to (S, S, 3) uint8; an image of this size keeps its pixels."""
    side = geometry.size
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box=geometry.test_box(*image.size)))


def choose_side(images: Images) -> int:
    """Return a side in pixels: the median shorter side of up to 200 images spread over the table, at most 224."""
    step = max(1, len(images) // SAMPLE)
    sides = [side for row in range(0, len(images), step)[:SAMPLE] if (side := _read_shorter_side(images, row))]
    # If no header can be read, any side will do: decoding names the broken files.
    return min(LARGEST_SIDE, int(median(sides))) if sides else 1


def decode_all(images: Images, rows: Ints, geometry: Geometry) -> tuple[Tensor, dict[int, str]]:
    """Decode the images of ``rows``, resized and cropped as for testing.

    Returns:
        (len(rows), S, S, 3) uint8, undefined where an image could not be read; and the reason for each such row.
    """
    out = np.empty((len(rows), geometry.size, geometry.size, 3), dtype=np.uint8)

    def work(place: int) -> str | None:
        try:
            out[place] = evaluation_pixels(decode_rgb(read_encoded(images, int(rows[place]))), geometry)
        except Unreadable as reason:
            return str(reason)
        return None

    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        reasons = list(pool.map(work, range(len(rows))))
    return torch.from_numpy(out), {int(rows[place]): reason for place, reason in enumerate(reasons) if reason is not None}


def available_memory() -> int | None:
    """Return the bytes of main memory that are available; None if the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _convert_to_rgb(image: Image.Image, *, sixteen: bool) -> Image.Image:
    """Return ``image`` in RGB without alpha; ``sixteen`` says whether a gray image of more than 8 bits has 16 bits."""
    if image.mode.startswith(("I", "F")):  # gray with more than 8 bits: Pillow itself would turn all above 255 white
        return Image.fromarray(_scale_to_bytes(np.asarray(image), sixteen=sixteen)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:  # Pillow warns if such a palette is converted directly
        image = image.convert("RGBA")
    return image.convert("RGB")


def _scale_to_bytes(values: NDArray[Any], *, sixteen: bool) -> NDArray[np.uint8]:
    """Scale the (H, W) values of a gray image to uint8.

    Values of 16 bits lose the lower 8. Other formats do not state their range, so it is inferred:

    - Floats within 0 to 1, or a tenth outside of it because resampling overshoots, are fractions of white.
    - Values within 0 to 255 are bytes, provided that they are whole numbers or that the largest is above 25.5.
    - All other values are scaled so that the smallest becomes 0 and the largest 255.

    Raises:
        Unreadable: a value is not finite.
    """
    if sixteen:
        return (values.clip(0, 65535) // 256).astype(np.uint8)
    if not np.isfinite(values).all():
        raise Unreadable("values that are not finite")
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "f" and low >= -0.1 and high <= 1.1:
        return (values.clip(0, 1).astype(np.float64) * 255).round().astype(np.uint8)
    if low >= 0 and high <= 255 and (high > 25.5 or bool((values == np.round(values)).all())):
        return values.astype(np.uint8)
    return ((values.astype(np.float64) - low) * (255 / (high - low if high > low else 1))).round().astype(np.uint8)


def _identify_format(data: bytes) -> str | None:
    """Return the format of an image that Pillow cannot open; None if the bytes do not look like an image."""
    begins = (data[:4], data[4:12])  # ISO formats begin with the length of a box
    return next((what for magic, what in OTHER_FORMATS.items() if magic in begins), None)


def _read_shorter_side(images: Images, row: int) -> int | None:
    try:
        with Image.open(io.BytesIO(images.encoded(row))) as image:  # decodes the header only
            return min(image.size)
    except Exception:  # as in decode_rgb, which reports the file
        return None
