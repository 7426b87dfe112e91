"""Images that occur more than once: files with the same bytes or, of images in memory, the same pixels."""

from collections import Counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastadvisor.datasets.images import ArrayImages, Images
from fastadvisor.datasets.paths import Ints

MOST_READ = 50_000
"""Most files that are read before a run to find duplicates; this takes half a minute from a disk."""


class DuplicatePair(NamedTuple):
    """Row ``one`` of the first table of images and row ``other`` of the second have the same content."""

    one: int
    other: int


def find_duplicates(
    first: Images, rows: Ints, second: Images, others: Ints, most_read: int = MOST_READ
) -> list[DuplicatePair] | None:
    """Find which of some images of ``first`` occur among some images of ``second`` as well.

    Only files whose sizes are equal are read. A file that cannot be read counts as having no duplicate: the loaders report it.

    Args:
        first: the table that ``rows`` are rows of.
        rows: (n,) int64.
        second: the table that ``others`` are rows of; it may be the same as ``first``.
        others: (m,) int64; if the tables are the same, none of ``rows`` may be among them.
        most_read: the most files to read.

    Returns:
        One pair for each of ``rows`` that has a duplicate, in order; None if more than ``most_read`` files would need reading.
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
    """Return which images occur more than once, (N,) bool; None if more than ``most_read`` files would have to be read."""
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
    """Return the digest of an image's content, 16 bytes; None if it cannot be read."""
    try:
        return images.digest(row)
    except OSError:
        return None
