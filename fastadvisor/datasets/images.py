"""Tables of images in memory, in files, or in tar shards, behind one interface: the encoded bytes of a row."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastadvisor.datasets.paths import Ints, PathTable

UNKNOWN = -2
"""In place of a size that the file system has not been asked for yet."""

STAT_THREADS = 16
"""Threads that ask the file system for sizes: on a network file system every answer takes a round trip."""


class Images(Protocol):
    """A table of N images, numbered by row from 0."""

    def __len__(self) -> int: ...

    def encoded(self, row: int) -> bytes:
        """Return the bytes of the encoded image (JPEG, PNG, PPM, ...).

        Raises:
            OSError: it cannot be read.
        """
        ...

    def name(self, row: int) -> str:
        """Return what to call the image in messages: its path or its number."""
        ...

    def select(self, rows: NDArray[np.integer]) -> "Images":
        """Return the images of ``rows``, in that order."""
        ...

    def sizes(self, rows: NDArray[np.integer]) -> Ints:
        """Return (len(rows),) int64, the encoded size of each image in bytes; -1 where there is no such file."""
        ...

    def times(self, rows: NDArray[np.integer]) -> Ints:
        """Return (len(rows),) int64, when each was last modified, in nanoseconds since 1970; -1 where there is no file."""
        ...

    def digest(self, row: int) -> bytes:
        """Return 16 bytes that are equal for two images if and only if their content is.

        Raises:
            OSError: the image cannot be read.
        """
        ...


class ArrayImages:
    """Images in memory, all of the same size."""

    def __init__(self, pixels: Tensor, files: "Images | None" = None, bad: Mapping[int, str] | None = None) -> None:
        """Take the pixels.

        Args:
            pixels: (N, H, W, 3) uint8.
            files: the images that the pixels were decoded from, for their names.
            bad: for each row that could not be decoded, the reason; the pixels of such a row are undefined.
        """
        self.pixels, self.files, self.bad = pixels, files, dict(bad or {})

    @property
    def originals(self) -> "Images | None":
        """The images that the pixels were decoded from; None if they were made in memory."""
        return self.files

    def __len__(self) -> int:
        return len(self.pixels)

    def encoded(self, row: int) -> bytes:
        """Return the image as a PPM file, which stores the pixels unchanged."""
        return encode_ppm(self.pixels[row].cpu().numpy())

    def name(self, row: int) -> str:
        """Return the name of the file that the row was decoded from, or "number ROW"."""
        return f"number {row}" if self.files is None else self.files.name(row)

    def select(self, rows: NDArray[np.integer]) -> "ArrayImages":
        """Return the images of ``rows``, in that order; the pixels are copied."""
        bad = {place: self.bad[row] for place, row in enumerate(rows.tolist()) if row in self.bad}
        files = None if self.files is None else self.files.select(rows)
        return ArrayImages(self.pixels[torch.from_numpy(np.asarray(rows, dtype=np.int64))], files, bad)

    def sizes(self, rows: NDArray[np.integer]) -> Ints:
        """Return H * W * 3 for each row, -1 for rows that could not be decoded."""
        sizes = np.full(len(rows), int(np.prod(self.pixels.shape[1:])), dtype=np.int64)
        return np.where(np.isin(rows, list(self.bad)), -1, sizes) if self.bad else sizes

    def times(self, rows: NDArray[np.integer]) -> Ints:
        """Return -1 for each row: pixels have no time."""
        return np.full(len(rows), -1, dtype=np.int64)

    def digest(self, row: int) -> bytes:
        """Return a digest of the pixels."""
        return digest_bytes(self.pixels[row].cpu().contiguous().numpy().tobytes())


class FileImages:
    """Image files in a folder."""

    def __init__(self, root: Path, paths: PathTable) -> None:
        """Take the folder and the paths relative to it."""
        self.root, self.paths = Path(root), paths
        self._stat: Ints | None = None
        """(N, 2) int64: the size and the time of each file that the file system has been asked about, UNKNOWN for the others.
        Kept because several parts of a run ask, and a million files take seconds."""
        self._absolute: PathTable | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def encoded(self, row: int) -> bytes:
        """Read the file."""
        with open(self._path(row), "rb", buffering=0) as file:
            return file.read()

    def name(self, row: int) -> str:
        """Return the path."""
        return self._path(row)

    def select(self, rows: NDArray[np.integer]) -> "FileImages":
        """Return the files of ``rows``; nothing is read."""
        selected = FileImages(self.root, self.paths.select(rows))
        selected._stat = None if self._stat is None else self._stat[rows]
        return selected

    def sizes(self, rows: NDArray[np.integer]) -> Ints:
        """Return the sizes; the file system is asked only once about each file."""
        return self._stat_rows(rows)[:, 0]

    def times(self, rows: NDArray[np.integer]) -> Ints:
        """Return the times of modification; the file system is asked only once about each file."""
        return self._stat_rows(rows)[:, 1]

    def _stat_rows(self, rows: NDArray[np.integer]) -> Ints:
        if self._stat is None:
            self._stat = np.full((len(self), 2), UNKNOWN, dtype=np.int64)
        unknown = rows[self._stat[rows, 0] == UNKNOWN]
        self._stat[unknown] = self._read_stat(unknown)
        return self._stat[rows]

    def _read_stat(self, rows: NDArray[np.integer]) -> Ints:

        def ask(row: int) -> tuple[int, int]:
            try:
                status = os.stat(self._path(row))
            except OSError:
                return -1, -1
            return status.st_size, status.st_mtime_ns

        if len(rows) < 1000:
            return np.array([ask(row) for row in rows.tolist()], dtype=np.int64).reshape(-1, 2)
        with ThreadPoolExecutor(STAT_THREADS) as pool:
            found = pool.map(lambda part: [ask(row) for row in part.tolist()], np.array_split(rows, 8 * STAT_THREADS))
            return np.array([one for part in found for one in part], dtype=np.int64)

    def digest(self, row: int) -> bytes:
        """Return a digest of the file's bytes."""
        return digest_bytes(self.encoded(row))

    def _path(self, row: int) -> str:
        return os.path.join(self.root, self.paths[row])

    def absolute_paths(self) -> PathTable:
        """Return the absolute path of each file with the links in its folder resolved, so that equal files have equal paths."""
        if self._absolute is None:
            folders: dict[str, str] = {}

            def whole(path: str) -> str:
                folder, name = os.path.split(os.path.join(self.root, path))
                if name in ("", ".", ".."):
                    return os.path.realpath(os.path.join(folder, name))
                if folder not in folders:
                    folders[folder] = os.path.realpath(folder)
                return os.path.join(folders[folder], name)

            self._absolute = PathTable.of(whole(self.paths[row]) for row in range(len(self)))
        return self._absolute


def match_files(files: Images, others: Images) -> Ints:
    """Return for each image of ``files`` the row of the same file in ``others``, compared by path.

    Images that were decoded or copied from files are compared by the paths of those files.

    Returns:
        (N,) int64: the first row of ``others`` that is the same file; -1 where none is, and everywhere if one table
        does not consist of files.
    """
    one, other = find_originals(files), find_originals(others)
    none = np.full(len(files), -1, dtype=np.int64)
    if not (isinstance(one, FileImages) and isinstance(other, FileImages)):
        return none
    mine, theirs = one.paths.normalise(), other.paths.normalise()
    if (
        os.path.realpath(one.root) != os.path.realpath(other.root)
        or mine.any_may_leave_folder()
        or theirs.any_may_leave_folder()
    ):
        mine, theirs = one.absolute_paths(), other.absolute_paths()
    return theirs.find(mine)


def find_originals(images: Images) -> Images:
    """Return the images that ``images`` were decoded or copied from; ``images`` itself if they were not."""
    while (source := getattr(images, "originals", None)) is not None:
        images = source
    return images


class TarImages:
    """Members of uncompressed tar files (WebDataset shards), which are read by their offset without unpacking."""

    def __init__(self, shards: Sequence[Path], shard: Ints, offset: Ints, size: Ints, names: PathTable) -> None:
        """Take the tar files and, for each of N images, the number of its shard, its offset and size in bytes, and its name."""
        self.shards, self.shard, self.offset, self.size, self.names = list(shards), shard, offset, size, names

    def __len__(self) -> int:
        return len(self.shard)

    def encoded(self, row: int) -> bytes:
        """Return the bytes of the member; raise OSError if the shard is shorter than it should be."""
        size = int(self.size[row])
        with open(self.shards[self.shard[row]], "rb", buffering=0) as file:
            file.seek(int(self.offset[row]))
            data = file.read(size)
        if len(data) < size:
            raise OSError(f"{self.shards[self.shard[row]]} is cut short")
        return data

    def name(self, row: int) -> str:
        """Return "SHARD:MEMBER"."""
        return f"{self.shards[self.shard[row]]}:{self.names[row]}"

    def select(self, rows: NDArray[np.integer]) -> "TarImages":
        """Return the members of ``rows``; nothing is read."""
        parts = (self.shard[rows], self.offset[rows], self.size[rows])
        return TarImages(self.shards, *parts, self.names.select(rows))

    def sizes(self, rows: NDArray[np.integer]) -> Ints:
        """Return the members' sizes."""
        return self.size[rows]

    def times(self, rows: NDArray[np.integer]) -> Ints:
        """Return when the shard of each member was last modified."""
        of_shard = [shard.stat().st_mtime_ns for shard in self.shards]
        return np.array(of_shard, dtype=np.int64)[self.shard[rows]]

    def digest(self, row: int) -> bytes:
        """Return a digest of the member's bytes."""
        return digest_bytes(self.encoded(row))


def encode_ppm(pixels: NDArray[np.uint8]) -> bytes:
    """Return (H, W, 3) uint8 ``pixels`` as a PPM file: a header and the plain bytes, which every decoder can read."""
    height, width = pixels.shape[:2]
    return b"P6\n%d %d\n255\n" % (width, height) + np.ascontiguousarray(pixels).tobytes()


def digest_bytes(content: bytes) -> bytes:
    """Return the BLAKE2b digest of ``content``, 16 bytes."""
    return hashlib.blake2b(content, digest_size=16).digest()
