"""Small copies of large images, which are made once and read from then on (``--cache-size``).

Decoding a JPEG of 500 pixels takes four times as long as one of 256, and a file system reads a few shards faster than a million
files. A shard is a tar file with the copies of up to a thousand images. Its name is a digest of the names, sizes and times of
those images and of the content of some. So copies of images that have changed are made again, and an interrupted run keeps the
shards that it has finished.
"""

import hashlib
import io
import os
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from fastadvisor.config import LoaderConfig
from fastadvisor.datasets.duplicates import read_digest
from fastadvisor.datasets.images import ArrayImages, Images, TarImages
from fastadvisor.datasets.paths import Ints
from fastadvisor.datasets.types import Split
from fastadvisor.errors import UserError
from fastadvisor.loading.decode import Unreadable, decode_rgb, read_encoded
from fastadvisor.loading.geometry import Geometry
from fastadvisor.runtime.environment import cache_folder, cpu_cores

SHARD = 1000
"""Number of images in a shard."""

QUALITY = 95
"""JPEG quality of the copies, with colour at half the resolution as in cameras: two grey levels of error on average."""

READ = 16
"""Number of images whose content is part of the name of their shard. An image may be replaced
by another of the same size and time, as programs that copy times leave it, but hardly ever just one image."""

VERSION = "2"
"""Part of the name of every shard; to be changed whenever the copies would come out differently."""


class CopiedImages(TarImages):
    """Small copies in shards; each is compared with its checksum when it is read."""

    def __init__(
        self, shards: list[Path], shard: Ints, offset: Ints, size: Ints, crc: Ints, reasons: dict[int, str], originals: Images
    ) -> None:
        """Take the place and CRC-32 of each copy, the reason for each row without a copy, and the originals."""
        self.shards, self.shard, self.offset, self.size = shards, shard, offset, size
        self.crc, self.reasons, self.originals = crc, reasons, originals

    def encoded(self, row: int) -> bytes:
        """Return the bytes of the copy; raise OSError if it is damaged or there is none."""
        if row in self.reasons:
            raise OSError(self.reasons[row])
        data = super().encoded(row)
        if zlib.crc32(data) != self.crc[row]:
            raise OSError(f"its copy is damaged: delete {self.shards[self.shard[row]]}")
        return data

    def name(self, row: int) -> str:
        """Return the original's name."""
        return self.originals.name(row)

    def select(self, rows: NDArray[np.integer]) -> "CopiedImages":
        """Return the copies of ``rows``; nothing is read."""
        reasons = {place: self.reasons[row] for place, row in enumerate(rows.tolist()) if row in self.reasons}
        parts = (self.shard[rows], self.offset[rows], self.size[rows], self.crc[rows])
        return CopiedImages(self.shards, *parts, reasons, self.originals.select(rows))

    def sizes(self, rows: NDArray[np.integer]) -> Ints:
        """Return the size of each copy in bytes, -1 where there is none."""
        return np.where(self.size[rows] > 0, self.size[rows], -1)


class _Table(NamedTuple):
    """The contents of a shard: (n,) int64 each, for its n images in order."""

    offset: Ints
    size: Ints
    crc: Ints
    bad: Ints
    """The places of images without a copy; the arrays above are zero there."""
    reasons: NDArray[np.str_]
    """The reason for each of ``bad``."""


def cache_resized(split: Split, part: str, config: LoaderConfig, geometry: Geometry) -> Split:
    """Return ``split`` with copies in place of its images; the shorter side of a copy is at most ``config.cache_size`` pixels.

    Images that are no larger are copied byte by byte. Copies that exist already are not made again.

    Args:
        split: image files with their labels.
        part: the name of the part, for the progress bar.
        config: the size of the copies, and their folder.
        geometry: how the copies are resized and cropped later.

    Raises:
        UserError: the images are in memory, the copies would be smaller than the resized images, or the folder cannot be
            written to.
    """
    size = config.cache_size
    if size is None:
        return split
    if isinstance(split.images, ArrayImages):
        raise UserError("--cache-size is for data sets of image files, and this one is in memory as it is: drop it.")
    if size < geometry.resize:
        raise UserError(
            f"--cache-size {size} is under the {geometry.resize} pixels that images are brought to: "
            "raise it, or lower --resize-size or --image-size."
        )
    folder = _locate_folder(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return Split(_make_copies(split.images, part, size, folder), split.labels)
    except OSError as error:
        raise UserError(
            f"Cannot write the small copies to {folder} ({error.strerror or error}): choose another --cache-dir."
        ) from None


def _locate_folder(config: LoaderConfig) -> Path:
    folder = cache_folder() if config.cache_dir is None else Path(config.cache_dir)
    return folder / f"copies-{config.cache_size}"


def _make_copies(images: Images, part: str, size: int, folder: Path) -> Images:
    count = len(images)
    sizes, times = images.sizes(np.arange(count)), images.times(np.arange(count))
    shards: list[Path] = []
    tables: list[_Table] = []
    reasons: dict[int, str] = {}
    with (
        ThreadPoolExecutor(cpu_cores()) as pool,
        tqdm(total=count, unit="image", desc=f"Small copies of the {part} images", disable=None) as bar,
    ):
        for start in range(0, count, SHARD):
            rows = np.arange(start, min(start + SHARD, count))
            shard = folder / f"{_name_shard(images, rows, sizes[rows], times[rows], size)}.tar"
            table = _read_table(shard)
            if table is None:
                table = _write_shard(images, rows, size, shard, pool)
            shards.append(shard)
            tables.append(table)
            reasons |= {start + int(row): str(why) for row, why in zip(table.bad, table.reasons, strict=True)}
            bar.update(len(rows))
    number = np.repeat(np.arange(len(shards)), [len(table.size) for table in tables])
    offset, length, crc = (np.concatenate(column) for column in list(zip(*tables, strict=True))[:3])
    return CopiedImages(shards, number, offset, length, crc, reasons, images)


def _name_shard(images: Images, rows: Ints, sizes: Ints, times: Ints, size: int) -> str:
    """Return the name of the shard that holds the copies of ``rows``."""
    digest = hashlib.blake2b(f"{VERSION} {size} {QUALITY}".encode(), digest_size=16)
    for row, length, time in zip(rows.tolist(), sizes.tolist(), times.tolist(), strict=True):
        digest.update(os.fsencode(f"\0{os.path.abspath(images.name(row))}\0{length}\0{time}"))
    for row in rows[np.unique(np.linspace(0, len(rows) - 1, READ, dtype=np.int64))].tolist():
        digest.update(read_digest(images, row) or b"")
    return digest.hexdigest()


def _write_shard(images: Images, rows: Ints, size: int, shard: Path, pool: ThreadPoolExecutor) -> _Table:
    """Write the copies of ``rows`` and after them their table: a shard without a table is not finished."""
    offset, length, crc = (np.zeros(len(rows), dtype=np.int64) for _ in range(3))
    bad: dict[int, str] = {}
    partial = shard.with_suffix(f".{os.getpid()}.partial")
    try:
        with tarfile.open(partial, "w") as tar:
            for place, copy in enumerate(pool.map(lambda row: _try_copy(images, row, size), rows.tolist())):
                if isinstance(copy, Unreadable):
                    bad[place] = str(copy)
                    continue
                member = tarfile.TarInfo(f"{place:04}.jpg")
                member.size = len(copy)
                offset[place], length[place], crc[place] = tar.offset + tarfile.BLOCKSIZE, len(copy), zlib.crc32(copy)
                tar.addfile(member, io.BytesIO(copy))
        os.replace(partial, shard)
        table = _Table(offset, length, crc, np.array(list(bad), dtype=np.int64), np.array(list(bad.values()), dtype=np.str_))
        with open(partial, "wb") as file:
            np.savez(file, **table._asdict())
        os.replace(partial, shard.with_suffix(".npz"))
    finally:
        partial.unlink(missing_ok=True)
    return table


def _read_table(shard: Path) -> _Table | None:
    """Return the table of a finished shard; None if the shard has to be made."""
    try:
        with np.load(shard.with_suffix(".npz"), allow_pickle=False) as file:
            table = _Table(*(file[key] for key in _Table._fields))
        whole = shard.stat().st_size >= int((table.offset + table.size).max(initial=0))
    except Exception:  # numpy raises OSError, ValueError, EOFError, BadZipFile, KeyError and more
        return None
    return table if whole else None


def _try_copy(images: Images, row: int, size: int) -> bytes | Unreadable:
    try:
        return _copy(read_encoded(images, row), size)
    except Unreadable as reason:
        return reason


def _copy(data: bytes, size: int) -> bytes:
    """Return ``data`` unchanged if its shorter side is at most ``size`` pixels, otherwise resized to ``size``, as JPEG.

    Raises:
        Unreadable: the file is truncated, damaged, or not an image.
    """
    image = decode_rgb(data)
    if min(image.size) <= size:
        return data
    out = io.BytesIO()
    # Grid and filter are those of testing, so copies at --resize-size give the pixels that the originals would.
    target = Geometry(size, size, "pad").resized(*image.size)
    image.resize(target, Image.Resampling.BILINEAR).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()
