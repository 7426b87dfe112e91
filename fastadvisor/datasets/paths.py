"""Millions of paths in one byte buffer: no Python object for each of them, and nothing to copy when a worker is forked."""

import os
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]


class PathTable:
    """N relative paths as slices of one buffer, so that the bytes of a list file can be used as they are."""

    def __init__(self, buffer: Bytes, start: Ints, stop: Ints) -> None:
        """Take ``buffer``, uint8 of any length, and the offsets at which each path starts and stops, (N,) int64 each."""
        self.buffer, self.start, self.stop = buffer, start, stop

    @classmethod
    def of(cls, paths: Iterable[str]) -> "PathTable":
        """Build a table from strings, in the encoding of the file system."""
        joined, stops = bytearray(), []
        for path in paths:
            joined += os.fsencode(path)
            stops.append(len(joined))
        stop = np.array(stops, dtype=np.int64)
        return cls(np.frombuffer(bytes(joined), dtype=np.uint8), np.concatenate([[0], stop])[:-1].astype(np.int64), stop)

    @classmethod
    def concatenate(cls, tables: Sequence["PathTable"]) -> "PathTable":
        """Return the paths of ``tables`` one after another."""
        shifts = np.cumsum([0, *(len(table.buffer) for table in tables)]).tolist()
        start = np.concatenate([table.start + shift for table, shift in zip(tables, shifts, strict=False)])
        stop = np.concatenate([table.stop + shift for table, shift in zip(tables, shifts, strict=False)])
        return cls(np.concatenate([table.buffer for table in tables]), start, stop)

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, row: int) -> str:
        return os.fsdecode(self.buffer[self.start[row] : self.stop[row]].tobytes())

    def select(self, rows: NDArray[np.integer]) -> "PathTable":
        """Return the paths of ``rows``, in that order; the buffer is shared."""
        return PathTable(self.buffer, self.start[rows], self.stop[rows])

    def remove_prefix(self, prefix: str) -> "PathTable":
        """Return a table in which every path that begins with ``prefix`` has lost it; the buffer is shared."""
        wanted = os.fsencode(prefix)
        return PathTable(self.buffer, self.start + len(wanted) * self._start_with(wanted), self.stop)

    def normalise(self) -> "PathTable":
        """Return a table with ``./``, ``//`` and ``x/..`` resolved in every path; this table itself if there are none."""
        here = self.buffer.tobytes()
        if not any(odd in here for odd in (b"./", b"//")):
            return self
        return PathTable.of(os.path.normpath(self[row]) for row in range(len(self)))

    def are_absolute(self) -> NDArray[np.bool_]:
        """Return which paths begin with a slash, (N,) bool."""
        return self._start_with(b"/")

    def any_may_leave_folder(self) -> bool:
        """Return whether any normalised path may lead out of the folder: whether it is absolute or begins with ``..``."""
        return bool((self.are_absolute() | self._start_with(b"..")).any())

    def _start_with(self, prefix: bytes) -> NDArray[np.bool_]:
        begins = self.stop - self.start >= len(prefix)
        for offset, byte in enumerate(prefix):
            begins &= self.buffer[np.minimum(self.start + offset, len(self.buffer) - 1)] == byte
        return begins

    def hashes(self) -> NDArray[np.uint64]:
        """Return a 64-bit polynomial hash of each path, (N,) uint64; equal paths have equal hashes."""
        value = (self.stop - self.start).astype(np.uint64)
        longest = int((self.stop - self.start).max(initial=0))
        for offset in range(longest):
            at = self.start + offset
            inside = at < self.stop
            byte = self.buffer[np.where(inside, at, 0)].astype(np.uint64) + np.uint64(1)
            value = np.where(inside, value * np.uint64(0x100000001B3) ^ byte, value)
        return value

    def find(self, others: "PathTable") -> Ints:
        """Return for each of the M paths of ``others`` its row in this table, (M,) int64; -1 where it is not in it."""
        if not len(self):
            return np.full(len(others), -1, dtype=np.int64)
        mine, theirs = self.hashes(), others.hashes()
        order = np.argsort(mine, kind="stable")
        at = np.minimum(np.searchsorted(mine[order], theirs), len(order) - 1)
        rows = order[at]
        # Different paths may have equal hashes, with a chance of 1 in 10^7 for a million files, so the paths are compared too.
        return np.where((mine[rows] == theirs) & self._equal(rows, others), rows, -1)

    def _equal(self, rows: Ints, others: "PathTable") -> NDArray[np.bool_]:
        start, stop = self.start[rows], self.stop[rows]
        same = (stop - start) == (others.stop - others.start)
        for offset in range(int((stop - start)[same].max(initial=0))):
            inside = same & (start + offset < stop)
            mine = self.buffer[np.where(inside, start + offset, 0)]
            theirs = others.buffer[np.where(inside, others.start + offset, 0)]
            same &= ~inside | (mine == theirs)
        return same
