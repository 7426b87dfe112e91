"""Where images are: in memory, in files, in the members of tar shards. One interface, encoded bytes by row."""

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
STAT_THREADS = 16
"""Threads that ask for file sizes: on a network file system each answer is a round trip."""


class Images(Protocol):
    """N images by row."""

    def __len__(self) -> int: ...

    def encoded(self, row: int) -> bytes:
        """Return the encoded image (JPEG, PNG, PPM, ...); OSError where it cannot be read."""
        ...

    def name(self, row: int) -> str:
        """Return what to call the image in a message: its path, or its number."""
        ...

    def select(self, rows: NDArray[np.integer]) -> "Images":
        """Return the images of ``rows``, in that order."""
        ...

    def sizes(self, rows: NDArray[np.integer]) -> Ints:
        """Return the encoded size of each of ``rows`` in bytes, -1 where there is no such file; (len(rows),) int64."""
        ...

    def times(self, rows: NDArray[np.integer]) -> Ints:
        """Return when each of ``rows`` was last written, in nanoseconds, -1 where there is no file; (len(rows),) int64."""
        ...

    def digest(self, row: int) -> bytes:
        """Return 16 bytes that are equal where the content is; OSError where it cannot be read."""
        ...


class ArrayImages:
    """Images that are in memory, all of one size."""

    def __init__(self, pixels: Tensor, files: "Images | None" = None, bad: Mapping[int, str] | None = None) -> None:
        """Take the pixels.

        Args:
            pixels: (N, H, W, 3) uint8.
            files: where they were decoded from, for their names.
            bad: rows that could not be decoded, with the reason; their pixels mean nothing.
        """
        self.pixels, self.files, self.bad = pixels, files, dict(bad or {})

    @property
    def originals(self) -> "Images | None":
        """What the pixels were decoded from."""
        return self.files

    def __len__(self) -> int:
        return len(self.pixels)

    def encoded(self, row: int) -> bytes:
        """Return the image as PPM, which holds the pixels as they are."""
        return encode_ppm(self.pixels[row].cpu().numpy())

    def name(self, row: int) -> str:
        """Return the file's name, or "number ROW"."""
        return f"number {row}" if self.files is None else self.files.name(row)

    def select(self, rows: NDArray[np.integer]) -> "ArrayImages":
        """Return the images of ``rows``, copied."""
        bad = {place: self.bad[row] for place, row in enumerate(rows.tolist()) if row in self.bad}
        files = None if self.files is None else self.files.select(rows)
        return ArrayImages(self.pixels[torch.from_numpy(np.asarray(rows, dtype=np.int64))], files, bad)

    def sizes(self, rows: NDArray[np.integer]) -> Ints:
        """Return H * W * 3 for each, -1 for the bad ones."""
        sizes = np.full(len(rows), int(np.prod(self.pixels.shape[1:])), dtype=np.int64)
        return np.where(np.isin(rows, list(self.bad)), -1, sizes) if self.bad else sizes

    def times(self, rows: NDArray[np.integer]) -> Ints:
        """Return -1 for each."""
        return np.full(len(rows), -1, dtype=np.int64)

    def digest(self, row: int) -> bytes:
        """Return a digest of the pixels."""
        return digest_bytes(self.pixels[row].cpu().contiguous().numpy().tobytes())


class FileImages:
    """Image files under a root."""

    def __init__(self, root: Path, paths: PathTable) -> None:
        """Take the folder and the paths relative to it."""
        self.root, self.paths = Path(root), paths
        self._stat: Ints | None = None
        """Size and time of each as far as the file system has told, UNKNOWN elsewhere, (N, 2): several stages ask, and a
        million files take seconds."""
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
        """Ask the file system, once for each file."""
        return self._stat_rows(rows)[:, 0]

    def times(self, rows: NDArray[np.integer]) -> Ints:
        """Likewise."""
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
        """Return the path of each, absolute and with the links in its folder resolved: one form for any way of writing it."""
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
    """Return for each of ``files`` the row of the same file, by its path, among ``others``, -1 where it is none of them; of a
    file that ``others`` hold several times, the first.

    Both may be in memory or copies; what they were decoded from counts. (N,) int64; all -1 where there are no files.
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
    """Return what ``images`` were decoded or copied from."""
    while (source := getattr(images, "originals", None)) is not None:
        images = source
    return images


class TarImages:
    """Members of uncompressed tar files (WebDataset shards): read where they lie, by offset."""

    def __init__(self, shards: Sequence[Path], shard: Ints, offset: Ints, size: Ints, names: PathTable) -> None:
        """Take the tar files, and for each image the number of its shard, where it begins, its size, and a name; (N,) each."""
        self.shards, self.shard, self.offset, self.size, self.names = list(shards), shard, offset, size, names

    def __len__(self) -> int:
        return len(self.shard)

    def encoded(self, row: int) -> bytes:
        """Read the member."""
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
        """Return when the members' shards were last written."""
        of_shard = [shard.stat().st_mtime_ns for shard in self.shards]
        return np.array(of_shard, dtype=np.int64)[self.shard[rows]]

    def digest(self, row: int) -> bytes:
        """Return a digest of the member's bytes."""
        return digest_bytes(self.encoded(row))


def encode_ppm(pixels: NDArray[np.uint8]) -> bytes:
    """Return (H, W, 3) uint8 ``pixels`` as a PPM file: a header and the bytes, which every decoder reads."""
    height, width = pixels.shape[:2]
    return b"P6\n%d %d\n255\n" % (width, height) + np.ascontiguousarray(pixels).tobytes()


def digest_bytes(content: bytes) -> bytes:
    """Return 16 bytes that are equal where ``content`` is."""
    return hashlib.blake2b(content, digest_size=16).digest()
