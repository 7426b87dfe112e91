"""Images that cannot be read are counted and listed; a run with too many of them is refused."""

import csv
import io
from collections.abc import Iterable, Mapping

import numpy as np

from fastadvisor.datasets.images import ArrayImages, Images
from fastadvisor.errors import UserError
from fastadvisor.loading.decode import Unreadable, decode_rgb, read_encoded

COLUMNS = ("part", "id", "reason", "image")
"""Header of the table of bad images."""

PROBED = 32
"""Most images of a part that are decoded before a run to find one that can be read."""


class BadImages:
    """The images of one part of a data set (training, meta, test, val) that cannot be read, by row."""

    def __init__(self, part: str, images: Images, total: int, max_fraction: float) -> None:
        """Set up.

        Args:
            part: the name of the part, for messages.
            images: the images of the part, for their names.
            total: number of images in the part.
            max_fraction: the fraction of ``total`` that may be bad; the number is rounded down.
        """
        self.part, self.images, self.total, self.max_fraction = part, images, total, max_fraction
        self.reasons: dict[int, str] = {}

    def add(self, found: Mapping[int, str]) -> None:
        """Add the images of ``found``, the reason by row; an image that is added twice counts once.

        Raises:
            UserError: more images are bad than may be; the message names the first.
        """
        self.reasons.update(found)
        if len(self.reasons) > int(self.max_fraction * self.total):
            first, reason = next(iter(self.reasons.items()))
            more = f" and {len(self.reasons) - 1} more" if len(self.reasons) > 1 else ""
            raise UserError(
                f"Cannot read the image {self.images.name(first)}{more} "
                f"({len(self.reasons)} of {self.total} {self.part} files; the first: {reason}): "
                f"replace or delete them, or raise --max-bad-fraction, which is {self.max_fraction:g}."
            )

    def probe(self) -> None:
        """Decode a few images spread over the part, so that a part of which nothing can be read is found before the run.

        Raises:
            UserError: none of the images that were tried can be read.
        """
        if not self.total or isinstance(self.images, ArrayImages):
            return
        reasons: dict[int, str] = {}
        for row in np.unique(np.linspace(0, len(self.images) - 1, PROBED, dtype=np.int64)).tolist():
            try:
                decode_rgb(read_encoded(self.images, row))
                return
            except Unreadable as error:
                reasons[row] = str(error)
        first, reason = next(iter(reasons.items()))
        raise UserError(
            f"None of {len(reasons)} {self.part} images that were looked at can be read (first: {self.images.name(first)}: "
            f"{reason}): replace them."
        )

    def first(self, count: int) -> list[tuple[int, str]]:
        """Return row and reason of the first ``count`` images."""
        return sorted(self.reasons.items())[:count]

    def rows(self) -> Iterable[tuple[str, int, str, str]]:
        """Return (part, id, reason, name) of each image."""
        return [(self.part, row, reason, self.images.name(row)) for row, reason in sorted(self.reasons.items())]


def to_csv(parts: Iterable[BadImages]) -> str:
    """Return a table of the bad images of all ``parts``, as CSV with a header."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for part in parts:
        writer.writerows(part.rows())
    return text.getvalue()
