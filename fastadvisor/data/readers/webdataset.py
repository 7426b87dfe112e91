"""WebDataset: images and labels in tar shards, read where they lie; nothing is unpacked."""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from fastadvisor.config import DataConfig
from fastadvisor.data.images import TarImages
from fastadvisor.data.paths import Bytes, Ints, PathTable
from fastadvisor.data.readers.imagefolder import EXTENSIONS, MEAN, STD
from fastadvisor.data.readers.lists import number_of_classes, read_names, root_of
from fastadvisor.data.types import Source, Split
from fastadvisor.errors import UserError
from fastadvisor.runtime.environment import cache_folder

PARTS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "val", "valid", "validation"),
    "meta": ("meta",),
}
"""Words in the names of a part's shards, or the name of their folder."""

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
VERSION = "2"
"""Of what an index holds and how it is found; part of the cache's key."""
MOST = 2**31
THREADS = 8
"""Shards whose headers are read at a time: on a network file system each header is a round trip."""


class Index(NamedTuple):
    """The samples of a shard, (n,) each."""

    offset: Ints
    size: Ints
    labels: Ints
    names: Bytes
    """All names in one buffer."""
    ends: Ints
    """Where each name ends in it."""


def read(config: DataConfig) -> Source:
    """Read the shards beneath ``config.data_root``: ``train-000.tar`` or ``train/000.tar``, likewise test or val, and meta.

    A sample is the members of one name: an image, and the label in ``.cls`` (a number) or ``.json`` (its key ``label``).
    Class names are the lines of ``classes.txt`` in the root, if there is one. Only headers and labels are read, and their
    places kept in the user's cache folder for the next time.

    Raises:
        UserError: no shards of a part, one that is compressed or cut short, or a sample without an image or label.
    """
    root = root_of(config, "tar shards, as train-000.tar and test-000.tar")
    shards = {part: _shards(root, words) for part, words in PARTS.items()}
    for part in ("train", "test"):
        if not shards[part]:
            raise UserError(f"There are no {part} shards in {root}: name them as {part}-000.tar, or put them into {part}/.")
    splits = {part: _split(files, part) for part, files in shards.items() if files}
    names = read_names(root / "classes.txt") if (root / "classes.txt").is_file() else []
    count = number_of_classes((split.labels.numpy() for split in splits.values()), names)
    classes = names or [str(number) for number in range(count)]
    return Source("webdataset", classes, splits["train"], splits["test"], mean=MEAN, std=STD, meta=splits.get("meta"))


def _shards(root: Path, words: tuple[str, ...]) -> list[Path]:
    """Return the shards of the first of ``words`` that has any."""
    for word in words:
        beside = [path for path in _visible(root) if word in re.split(r"[^a-z]+", path.name.lower())]
        files = [path for path in beside if path.is_file()]
        for folder in beside:
            files += [path for path in _visible(folder) if path.is_file()] if folder.is_dir() else []
        for path in files:
            if path.name.endswith(COMPRESSED):
                raise UserError(f"{path} is compressed, so its images cannot be read where they lie: decompress the shards.")
        found = sorted(path for path in files if path.suffix == ".tar")
        if found:
            return found
    return []


def _visible(folder: Path) -> list[Path]:
    """Return what is in ``folder`` and not hidden, as the files that macOS leaves are."""
    try:
        return [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be read ({error.strerror}): check --data-root.") from None


def _split(shards: list[Path], part: str) -> Split:
    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(
            total=len(shards), unit="shard", desc=f"Reading the headers of the {part} shards", disable=None, leave=False
        ) as bar,
    ):
        indices = []
        for index in pool.map(_index, shards):
            indices.append(index)
            bar.update()
    lengths = [len(index.size) for index in indices]
    starts = np.cumsum([0, *(len(index.names) for index in indices)]).tolist()
    ends = np.concatenate([index.ends + start for index, start in zip(indices, starts, strict=False)])
    begins = np.concatenate([np.append(0, index.ends[:-1]) + start for index, start in zip(indices, starts, strict=False)])
    names = PathTable(np.concatenate([index.names for index in indices]), begins.astype(np.int64), ends)
    offset, size, labels = (np.concatenate(column) for column in list(zip(*indices, strict=True))[:3])
    return Split(TarImages(shards, np.repeat(np.arange(len(shards)), lengths), offset, size, names), torch.from_numpy(labels))


def _index(shard: Path) -> Index:
    """Return the samples of ``shard``, from the cache if the file has not changed."""
    try:
        status = shard.stat()
    except OSError as error:
        raise UserError(f"The shard {shard} cannot be read ({error.strerror}).") from None
    stamp = f"{VERSION} {shard.resolve()} {status.st_size} {status.st_mtime_ns}"
    name = hashlib.blake2b(os.fsencode(stamp), digest_size=16).hexdigest()
    kept = cache_folder() / "shards" / f"{name}.npz"
    try:
        with np.load(kept, allow_pickle=False) as file:
            return Index(*(file[field] for field in Index._fields))
    except Exception:  # not there, or damaged: numpy raises OSError, ValueError, KeyError, BadZipFile and more
        index = _scan(shard)
    partial = kept.with_suffix(f".{os.getpid()}.partial")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as stream:
            np.savez(stream, **index._asdict())
        os.replace(partial, kept)
    except OSError:  # a cache is a convenience
        pass
    return index


def _scan(shard: Path) -> Index:
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                key, extension = _key_and_extension(member.name)
                if not member.isfile() or key is None:
                    continue
                kind = extension.rpartition(".")[2]
                if f".{kind}" in EXTENSIONS:
                    if kind == extension or key not in images:  # the image is .jpg, and .mask.png beside it is not
                        images[key] = (member.offset_data, member.size)
                elif kind in ("cls", "json"):
                    content = tar.extractfile(member)
                    assert content is not None
                    label = _label(content.read(), kind, shard, member.name)
                    if label is not None and (kind == "cls" or key not in labels):
                        labels[key] = label
            end = tar.offset
        with open(shard, "rb") as file:  # tarfile takes a file that is cut short, or damaged further on, for its end
            file.seek(end)
            whole = file.read(tarfile.BLOCKSIZE) == tarfile.NUL * tarfile.BLOCKSIZE
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"The shard {shard} is damaged or no tar file ({error}): fetch it again, uncompressed.") from None
    if not whole:
        raise UserError(f"The shard {shard} is cut short or damaged: fetch it again.")
    alone = next(_lonely(images, labels), None)
    if alone is not None:
        raise UserError(f"{shard}: the sample {alone} lacks an image, or a label in .cls or .json: write the shard again.")
    if not images:
        raise UserError(f"The shard {shard} holds no images: take it away, or write it again.")
    encoded = [os.fsencode(key) for key in images]
    places = np.array(list(images.values()), dtype=np.int64)
    return Index(
        places[:, 0],
        places[:, 1],
        np.array([labels[key] for key in images], dtype=np.int64),
        np.frombuffer(b"".join(encoded), dtype=np.uint8),
        np.cumsum([len(key) for key in encoded]).astype(np.int64),
    )


def _key_and_extension(name: str) -> tuple[str | None, str]:
    """Split at the first dot of the last part; a hidden file belongs to no sample, as in WebDataset."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem if stem else None, extension.lower()


def _label(content: bytes, extension: str, shard: Path, member: str) -> int | None:
    """Return the class number in a member; None where a .json holds other things than a label."""
    try:
        value = content
        if extension == "json":
            told = json.loads(content)
            if not isinstance(told, dict) or "label" not in told:
                return None
            value = told["label"]
        number = int(value)
        if not 0 <= number < MOST or number != float(value):
            raise ValueError
        return number
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise UserError(f"{shard}: {member} does not hold a class number: write the shard again.") from None


def _lonely(images: dict[str, tuple[int, int]], labels: dict[str, int]) -> Iterator[str]:
    """Return the samples that have an image or a label, and not both."""
    yield from images.keys() ^ labels.keys()
