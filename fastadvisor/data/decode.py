"""Image files to one uint8 tensor, in a thread pool (PIL releases the GIL while it decodes)."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from fastadvisor.errors import UserError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".gif", ".tif", ".tiff"})
"""What counts as an image; other files are passed over."""

LARGEST_SIDE = 224
"""Cap on the side chosen for the user: what the usual networks were designed for."""

SAMPLE = 200
"""Images whose headers are read to choose the side."""


def choose_side(paths: list[Path]) -> int:
    """Return the median of the shorter sides over up to 200 images spread over ``paths``, at most 224."""
    step = max(1, len(paths) // SAMPLE)
    sides = [side for path in paths[::step][:SAMPLE] if (side := _shorter_side(path))]
    # No readable header at all: any side will do, decoding names the broken files.
    return min(LARGEST_SIDE, int(median(sides))) if sides else 1


def available_memory() -> int | None:
    """Return the bytes of main memory that can still be had, or None where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def decode(paths: list[Path], side: int) -> Tensor:
    """Return the images of ``paths`` as (N, side, side, 3) uint8.

    Each is turned upright by its EXIF tag, converted to RGB, its shorter side resized to ``side`` and its centre cut
    out; an image that has this size already keeps its exact bytes (unless the file itself is lossy, as decoded).

    Raises:
        UserError: files that cannot be decoded; names the first and counts them.
    """
    out = np.empty((len(paths), side, side, 3), dtype=np.uint8)

    def work(row: int) -> bool:
        return _decode_into(out[row], paths[row], side)

    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        readable = list(pool.map(work, range(len(paths))))
    broken = [path for path, good in zip(paths, readable, strict=True) if not good]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise UserError(
            f"Cannot read the image {broken[0]}{more} ({len(broken)} of {len(paths)} files broken or empty): "
            "replace or delete them."
        )
    return torch.from_numpy(out)


def _decode_into(out: NDArray[np.uint8], path: Path, side: int) -> bool:
    """Fill ``out`` (side, side, 3) from ``path``; return whether the file could be read."""
    try:
        with Image.open(path) as image:
            out[...] = np.asarray(_square(_rgb(ImageOps.exif_transpose(image)), side))
        return True
    except MemoryError:
        raise
    # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError and more on damaged files.
    except Exception:
        return False


def _rgb(image: Image.Image) -> Image.Image:
    """Return ``image`` in RGB, alpha dropped."""
    if image.mode.startswith("I"):  # 16-bit gray: PIL's own conversion would clip all above 255 to white
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:  # PIL warns when such a palette goes to RGB directly
        image = image.convert("RGBA")
    return image.convert("RGB")


def _square(image: Image.Image, side: int) -> Image.Image:
    """Return ``image`` with its shorter side resized to ``side``, and the centre of the longer one."""
    width, height = image.size
    if min(width, height) != side:
        scale = side / min(width, height)
        width, height = max(side, round(width * scale)), max(side, round(height * scale))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side)) if (width, height) != (side, side) else image


def _shorter_side(path: Path) -> int | None:
    try:
        with Image.open(path) as image:  # reads the header only
            return min(image.size)
    except Exception:  # as in _decode_into, which reports the file
        return None
