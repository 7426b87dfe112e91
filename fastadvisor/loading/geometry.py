"""Which window of an image becomes the square that the network sees: one answer for every loader."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastadvisor.config import LoaderConfig
from fastadvisor.errors import UserError

Draws = NDArray[np.float64]
TRIES = 10
"""Of an area and an aspect ratio that fit the image, before the centre is taken (torchvision)."""

DRAWS = 3 + 2 * TRIES
"""Uniform numbers a sample: mirror, horizontal and vertical position, and the tries."""

MIRROR, ACROSS, DOWN, AREAS = 0, 1, 2, 3
"""What each of them decides; from AREAS on, area and aspect ratio by turns."""

AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
"""Ranges of --crop resized: torchvision's (Szegedy et al. 2015)."""


@dataclass(frozen=True)
class Geometry:
    """How an image of any size becomes ``size`` × ``size`` pixels."""

    size: int
    resize: int
    """The shorter side before the crop."""
    crop: str
    """``LoaderConfig.crop``: pad, random or resized."""

    @classmethod
    def of(cls, config: LoaderConfig, size: int) -> "Geometry":
        """Return what ``config`` asks for, for an output of ``size`` pixels.

        Raises:
            UserError: a crop larger than what it is cut out of.
        """
        resize = config.resize_size or (size if config.crop == "pad" else round(size * 256 / 224))
        if resize < size:
            raise UserError(
                f"--resize-size {resize} is under the {size} pixels that are cut out: raise it, or lower --image-size."
            )
        return cls(size, resize, config.crop)

    def test_box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Return (left, top, right, bottom) in source pixels: shorter side to ``resize``, the centre cut out.

        The grid is that of torchvision's Resize and CenterCrop, roundings included.
        """
        across, down = self.resized(width, height)
        # Halves go up or down as in CenterCrop, which rounds to even.
        return self._in_source(round((across - self.size) / 2), round((down - self.size) / 2), width / across, height / down)

    def train_box(self, width: int, height: int, draws: Draws) -> tuple[int, int, int, int]:
        """Return (left, top, right, bottom) in whole source pixels, for --crop random and resized.

        Args:
            width: of the source in pixels.
            height: likewise.
            draws: (DRAWS,) uniform in [0, 1).
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
        """Return (width, height) with the shorter side brought to ``resize``, the longer rounded down as in torchvision."""
        if width <= height:
            return self.resize, int(self.resize * height / width)
        return int(self.resize * width / height), self.resize

    def _in_source(self, x: int, y: int, across: float, down: float) -> tuple[float, float, float, float]:
        return x * across, y * down, (x + self.size) * across, (y + self.size) * down


def _area_and_aspect(width: int, height: int, draws: Draws) -> tuple[int, int]:
    """Return (width, height) of a window of random area and aspect ratio; where no try fits, the largest of a near ratio."""
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
