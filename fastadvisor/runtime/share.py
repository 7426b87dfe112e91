"""Which samples of a batch are a rank's."""

from typing import NamedTuple


class Share(NamedTuple):
    """The part of a batch that is this rank's: every rank has as many samples, one after the other."""

    rank: int = 0
    ranks: int = 1

    def whole(self, rows: int) -> int:
        """Return how many samples all ranks have where each has ``rows``."""
        return rows * self.ranks

    def part(self, rows: int) -> slice:
        """Return which of all are this rank's."""
        return slice(self.rank * rows, (self.rank + 1) * rows)


WHOLE = Share()
"""Of a process that is alone."""
