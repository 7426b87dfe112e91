"""JPEGs that cost a decoder what photographs do, for benchmarks and tests: noise with the spectrum of natural images."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

OCTAVES = (3, 6, 12, 24, 48, 96, 192)
"""Grid sizes of the noise; each finer one is fainter, as in photographs."""


def photo(width: int, height: int, seed: int = 0, octaves: int = 5) -> Image.Image:
    """Return an RGB image that is different for each ``seed``; more ``octaves``, more detail and larger files."""
    rng = np.random.default_rng(seed)
    out = np.zeros((height, width, 3), np.float32)
    for grid in OCTAVES[:octaves]:
        noise = rng.standard_normal((grid, grid, 3)).astype(np.float32)
        for channel in range(3):
            coarse = Image.fromarray(noise[..., channel])
            out[..., channel] += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) * 80 / grid**0.5
    return Image.fromarray((out + 128).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    """Return ``image`` as a file's content."""
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def write_benchmark_set(root: Path, side: int, count: int, classes: int = 10) -> Path:
    """Write ``count`` training, a few meta and a few test images of ``side`` × 3/4 ``side`` pixels as folders of classes."""
    seed = 0
    for part, number in (("train", count), ("meta", 2 * classes), ("test", 4 * classes)):
        for index in range(number):
            folder = root / part / f"class{index % classes}"
            folder.mkdir(parents=True, exist_ok=True)
            image = photo(side, 3 * side // 4, seed, octaves=len(OCTAVES))
            (folder / f"{index:07}.jpg").write_bytes(encoded(image, quality=90))
            seed += 1
    return root
