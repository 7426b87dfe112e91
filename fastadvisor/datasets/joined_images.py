"""Several tables of images joined into one."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fastadvisor.datasets.images import ArrayImages, Images
from fastadvisor.datasets.paths import Ints


class JoinedImages:
    """Several tables of images, one after another."""

    def __init__(self, parts: Sequence[Images]) -> None:
        """Take the tables, in the order of their rows."""
        self.parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _find(self, row: int) -> tuple[Images, int]:
        part = int(np.searchsorted(self._ends, row, side="right"))
        return self.parts[part], int(row - (self._ends[part - 1] if part else 0))

    def encoded(self, row: int) -> bytes:
        """Return the bytes of the image, from the part that holds it."""
        part, inner = self._find(row)
        return part.encoded(inner)

    def name(self, row: int) -> str:
        """Return the name that its part gives to the image."""
        part, inner = self._find(row)
        return part.name(inner)

    def select(self, rows: NDArray[np.integer]) -> "Images":
        """Return a view of ``rows``; nothing is copied."""
        return _SelectedImages(self, np.asarray(rows, dtype=np.int64))

    def sizes(self, rows: NDArray[np.integer]) -> Ints:
        """Return the sizes that the parts report."""
        return self._gather(rows, lambda part, inner: part.sizes(inner))

    def times(self, rows: NDArray[np.integer]) -> Ints:
        """Return the times that the parts report."""
        return self._gather(rows, lambda part, inner: part.times(inner))

    def _gather(self, rows: NDArray[np.integer], ask: Callable[[Images, NDArray[np.integer]], Ints]) -> Ints:
        out = np.empty(len(rows), dtype=np.int64)
        which = np.searchsorted(self._ends, rows, side="right")
        for number, part in enumerate(self.parts):
            mine = which == number
            out[mine] = ask(part, rows[mine] - (self._ends[number - 1] if number else 0))
        return out

    def digest(self, row: int) -> bytes:
        """Return the digest that its part gives to the image."""
        part, inner = self._find(row)
        return part.digest(inner)


class _SelectedImages:
    """A view of some rows of another table."""

    def __init__(self, images: Images, rows: Ints) -> None:
        self.images, self.rows = images, rows

    def __len__(self) -> int:
        return len(self.rows)

    def encoded(self, row: int) -> bytes:
        return self.images.encoded(int(self.rows[row]))

    def name(self, row: int) -> str:
        return self.images.name(int(self.rows[row]))

    def select(self, rows: NDArray[np.integer]) -> Images:
        return _SelectedImages(self.images, self.rows[rows])

    def sizes(self, rows: NDArray[np.integer]) -> Ints:
        return self.images.sizes(self.rows[rows])

    def times(self, rows: NDArray[np.integer]) -> Ints:
        return self.images.times(self.rows[rows])

    def digest(self, row: int) -> bytes:
        return self.images.digest(int(self.rows[row]))


def join_images(parts: Sequence[Images]) -> Images:
    """Return one table of all images of ``parts``: a single array if all are in memory and of the same size."""
    if len(parts) == 1:
        return parts[0]
    arrays = [part for part in parts if isinstance(part, ArrayImages)]
    if len(arrays) < len(parts) or len({tuple(array.pixels.shape[1:]) for array in arrays}) > 1:
        return JoinedImages(parts)
    starts = np.cumsum([0, *(len(array) for array in arrays)]).tolist()
    bad = {start + row: why for start, array in zip(starts, arrays, strict=False) for row, why in array.bad.items()}
    return ArrayImages(torch.cat([array.pixels for array in arrays]), JoinedImages([a.files or a for a in arrays]), bad)
