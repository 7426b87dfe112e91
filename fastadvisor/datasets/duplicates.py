"""Images that are there twice: the same bytes under two numbers (of images in memory, the same pixels)."""

from collections import Counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastadvisor.datasets.images import ArrayImages, Images
from fastadvisor.datasets.paths import Ints

MOST_READ = 50_000
"""Files that are read, at most, to find twins before a run; half a minute from a disk."""


class DuplicatePair(NamedTuple):
    """Row ``one`` of the first images has the content of row ``other`` of the second."""

    one: int
    other: int


def find_duplicates(
    first: Images, rows: Ints, second: Images, others: Ints, most_read: int = MOST_READ
) -> list[DuplicatePair] | None:
    """Find the images of ``first`` that are among those of ``second`` too.

    Only files of equal size are read. A file that cannot be read has no twin: the loaders report it.

    Args:
        first: where to look for ``rows``.
        rows: (n,) int64.
        second: where to look for ``others``; may be the same table.
        others: (m,) int64, none of ``rows`` where the tables are one.
        most_read: files to read at most.

    Returns:
        One pair for each of ``rows`` that has a twin, in order; None if more files than ``most_read`` have a size in common.
    """
    sizes, other_sizes = first.sizes(rows), second.sizes(others)
    mine = rows[np.isin(sizes, other_sizes) & (sizes >= 0)]
    theirs = others[np.isin(other_sizes, sizes) & (other_sizes >= 0)]
    if len(mine) + len(theirs) > most_read and not (isinstance(first, ArrayImages) and isinstance(second, ArrayImages)):
        return None
    seen: dict[bytes, int] = {}
    for row in theirs.tolist():
        content = read_digest(second, row)
        if content is not None:
            seen.setdefault(content, row)
    found = ((row, read_digest(first, row)) for row in mine.tolist())
    return [DuplicatePair(row, seen[content]) for row, content in found if content is not None and content in seen]


def mark_repeated(images: Images, most_read: int = MOST_READ) -> NDArray[np.bool_] | None:
    """Return which images of a table are there more than once, (N,); None where that means reading too many files."""
    sizes = images.sizes(np.arange(len(images)))
    _, group, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    rows = np.flatnonzero((counts[group.reshape(-1)] > 1) & (sizes >= 0))
    if len(rows) > most_read and not isinstance(images, ArrayImages):
        return None
    contents = [read_digest(images, row) for row in rows.tolist()]
    times = Counter(content for content in contents if content is not None)
    found = np.zeros(len(images), dtype=np.bool_)
    found[rows] = [content is not None and times[content] > 1 for content in contents]
    return found


def read_digest(images: Images, row: int) -> bytes | None:
    """Return the digest of an image's content, None where it cannot be read."""
    try:
        return images.digest(row)
    except OSError:
        return None
