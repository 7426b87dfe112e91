"""Small copies of large images, made once and read ever after (``--cache-size``).

Decoding a 500-pixel JPEG costs four times a 256-pixel one, and a file system gives up a few shards more readily than a
million files. A shard holds the copies of up to a thousand images, one after another as a tar file; its name is a digest
of the names, sizes and times of the images in it, and of what is in some of them, so what has changed is made again and an
interrupted run goes on where it was.
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
"""Images in a shard."""

QUALITY = 95
"""Of the copies as JPEG, colour at half the resolution, as cameras do: two grey levels off the resized image on average."""

READ = 16
"""Images of a shard whose content is in its name: a picture may be drawn anew in the same size and keep its time, as a copying
program that keeps times leaves it, but hardly one alone."""

VERSION = "2"
"""Part of every shard's name: changes when copies come out otherwise."""


class CopiedImages(TarImages):
    """Small copies in shards, each checked against its checksum as it is read."""

    def __init__(
        self, shards: list[Path], shard: Ints, offset: Ints, size: Ints, crc: Ints, reasons: dict[int, str], originals: Images
    ) -> None:
        """Take where each copy lies, its CRC-32, why there is none (by row), and the originals, for their names."""
        self.shards, self.shard, self.offset, self.size = shards, shard, offset, size
        self.crc, self.reasons, self.originals = crc, reasons, originals

    def encoded(self, row: int) -> bytes:
        """Read the copy; OSError where it is damaged or there is none."""
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
        """Return the copies' sizes, -1 where there is none."""
        return np.where(self.size[rows] > 0, self.size[rows], -1)


class _Table(NamedTuple):
    """What a shard holds, for each of its images in order."""

    offset: Ints
    size: Ints
    crc: Ints
    bad: Ints
    """Places of the images of which there is no copy; the arrays above are zero there."""
    reasons: NDArray[np.str_]
    """Why, for each of ``bad``."""


def cache_resized(split: Split, part: str, config: LoaderConfig, geometry: Geometry) -> Split:
    """Return ``split`` with copies in place of its images, whose shorter side is ``config.cache_size`` at most.

    Smaller images are copied byte by byte. Copies that are there already are not made again.

    Args:
        split: of image files.
        part: what to call it on the progress bar.
        config: size and folder.
        geometry: what becomes of the copies.

    Raises:
        UserError: images that are in memory anyway, copies smaller than what the network is to see, or a folder that
            cannot be written to.
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
    """Write the copies of ``rows`` and, last, their table: a shard without one is not finished."""
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
    """Return the table of a finished shard; None where it is to be made."""
    try:
        with np.load(shard.with_suffix(".npz"), allow_pickle=False) as file:
            table = _Table(*(file[key] for key in _Table._fields))
        whole = shard.stat().st_size >= int((table.offset + table.size).max(initial=0))
    except Exception:  # numpy raises OSError, ValueError, EOFError, BadZipFile, KeyError and more: made again
        return None
    return table if whole else None


def _try_copy(images: Images, row: int, size: int) -> bytes | Unreadable:
    try:
        return _copy(read_encoded(images, row), size)
    except Unreadable as reason:
        return reason


def _copy(data: bytes, size: int) -> bytes:
    """Return ``data`` as it is if its shorter side is ``size`` at most, else brought to ``size`` as JPEG.

    Raises:
        Unreadable: cut short, damaged, or no image.
    """
    image = decode_rgb(data)
    if min(image.size) <= size:
        return data
    out = io.BytesIO()
    # Grid and filter are those of testing: copies at --resize-size give the pixels that the originals would.
    target = Geometry(size, size, "pad").resized(*image.size)
    image.resize(target, Image.Resampling.BILINEAR).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()
