"""Resizing and cropping: which window of an image becomes the square that the network sees, the same for every loader."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastadvisor.config import LoaderConfig
from fastadvisor.errors import UserError

Draws = NDArray[np.float64]
TRIES = 10
"""Attempts to draw an area and an aspect ratio that fit the image, before the centre is taken (as in torchvision)."""

DRAWS = 3 + 2 * TRIES
"""Uniform random numbers for each sample: mirror, horizontal and vertical position, and two for each attempt."""

MIRROR, ACROSS, DOWN, AREAS = 0, 1, 2, 3
"""The place of each among these numbers; from AREAS on, area and aspect ratio alternate."""

AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
"""Ranges of --crop resized, as a fraction of the image's area and as width / height (torchvision; Szegedy et al. 2015)."""


@dataclass(frozen=True)
class Geometry:
    """How an image of any size is resized and cropped to ``size`` × ``size`` pixels."""

    size: int
    resize: int
    """Shorter side in pixels of the resized image, before the crop."""
    crop: str
    """``LoaderConfig.crop``: pad, random or resized."""

    @classmethod
    def of(cls, config: LoaderConfig, size: int) -> "Geometry":
        """Return the geometry that ``config`` asks for, for an output of ``size`` × ``size`` pixels.

        Raises:
            UserError: the crop is larger than the resized image.
        """
        resize = config.resize_size or (size if config.crop == "pad" else round(size * 256 / 224))
        if resize < size:
            raise UserError(
                f"--resize-size {resize} is under the {size} pixels that are cut out: raise it, or lower --image-size."
            )
        return cls(size, resize, config.crop)

    def test_box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Return the window for testing, (left, top, right, bottom) in source pixels: the centre of the resized image.

        It is the window of torchvision's Resize and CenterCrop, with the same rounding.
        """
        across, down = self.resized(width, height)
        # As in CenterCrop, halves are rounded to even.
        return self._in_source(round((across - self.size) / 2), round((down - self.size) / 2), width / across, height / down)

    def train_box(self, width: int, height: int, draws: Draws) -> tuple[int, int, int, int]:
        """Return a random window, (left, top, right, bottom) in whole source pixels, for --crop random and resized.

        Args:
            width: width of the source in pixels.
            height: height of the source in pixels.
            draws: (DRAWS,) float64, uniform in [0, 1).
        """
        if self.crop == "random":
            across, down = self.resized(width, height)
            x, y = int(draws[ACROSS] * (across - self.size + 1)), int(draws[DOWN] * (down - self.size + 1))
            left, top, right, bottom = self._in_source(x, y, width / across, height / down)
            w, h = max(1, round(right - left)), max(1, round(bottom - top))
            x, y = min(round(left), width - w), min(round(top), height - h)
        else:
            w, h = _area_and_aspect(width, height, draws)
            x, y = int(draws[ACROSS] * (width - w + 1)), int(draws[DOWN] * (height - h + 1))
        return x, y, x + w, y + h

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Return (width, height) scaled to a shorter side of ``resize``; the longer side is rounded down as in torchvision."""
        if width <= height:
            return self.resize, int(self.resize * height / width)
        return int(self.resize * width / height), self.resize

    def _in_source(self, x: int, y: int, across: float, down: float) -> tuple[float, float, float, float]:
        return x * across, y * down, (x + self.size) * across, (y + self.size) * down


def _area_and_aspect(width: int, height: int, draws: Draws) -> tuple[int, int]:
    """Return (width, height) of a window of random area and aspect ratio; if none fits, the largest of an allowed ratio."""
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    for attempt in range(TRIES):
        one, two = float(draws[AREAS + 2 * attempt]), float(draws[AREAS + 2 * attempt + 1])
        area = width * height * (AREA[0] + (AREA[1] - AREA[0]) * one)
        aspect = math.exp(low + (high - low) * two)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return w, h
    if width / height < ASPECT[0]:
        return width, min(height, round(width / ASPECT[0]))
    if width / height > ASPECT[1]:
        return min(width, round(height * ASPECT[1])), height
    return width, height
