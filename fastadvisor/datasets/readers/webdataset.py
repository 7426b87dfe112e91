"""WebDataset: images and labels in tar shards, which are read in place; nothing is unpacked."""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from fastadvisor.config import DataConfig
from fastadvisor.datasets.images import TarImages
from fastadvisor.datasets.paths import Bytes, Ints, PathTable
from fastadvisor.datasets.readers.imagefolder import EXTENSIONS, MEAN, STD
from fastadvisor.datasets.readers.lists import count_classes, read_class_names
from fastadvisor.datasets.readers.locate import FOLDERS, find_root
from fastadvisor.datasets.types import Source, Split
from fastadvisor.errors import UserError
from fastadvisor.runtime.environment import cache_folder

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
VERSION = "3"
"""Version of the format of an index and of how it is made; part of its name in the cache."""
MOST = 2**31
METADATA = re.compile(r"__[^/]*__($|/)")
"""Names of members that describe a shard and belong to no sample."""
FIRST_DOT = "a key ends at the first dot of a name, so samples of their own need names without further dots."
THREADS = 8
"""Shards whose headers are read at a time: on a network file system every header takes a round trip."""


class Index(NamedTuple):
    """The n samples of a shard; (n,) int64 each unless noted."""

    offset: Ints
    size: Ints
    labels: Ints
    names: Bytes
    """All names in one buffer of uint8."""
    ends: Ints
    """The offset at which each name ends in it."""


def read(config: DataConfig) -> Source:
    """Read the shards beneath ``config.data_root``: ``train-000.tar`` or ``train/000.tar``, likewise test, val and meta.

    A sample consists of all members with the same key: an image, and a label in ``.cls`` (a number) or ``.json`` (its key
    ``label``). As in the webdataset library, the key of a member is its name up to the first dot, and what follows is the
    extension. The image is the member with an extension such as ``jpg`` or, without one, the only member with an extension such
    as ``v2.jpg``. The names of the classes are the lines of ``classes.txt`` in the root, if there is such a file. Only headers
    and labels are read; an index of them is kept in the user's cache folder.

    Raises:
        UserError: a part has no shards, a shard is compressed or cut short, a sample lacks an image or a label or has several,
            or a key occurs twice.
    """
    root = find_root(config, "tar shards, as train-000.tar and test-000.tar")
    shards = {part: _find_shards(root, words) for part, words in FOLDERS.items()}
    if not shards["test"]:
        shards["test"], shards["val"] = shards["val"], []
    parts: dict[Path, str] = {}
    for part, files in shards.items():
        for file in files:
            if file in parts:
                raise UserError(
                    f"The name of the shard {file} holds {parts[file]} and {part}, and which it belongs to is not to be "
                    "guessed: rename it, or put it into a folder of its part."
                )
            parts[file] = part
    for part in ("train", "test"):
        if not shards[part]:
            raise UserError(f"There are no {part} shards in {root}: name them as {part}-000.tar, or put them into {part}/.")
    splits = {part: _read_split(files, part) for part, files in shards.items() if files}
    names = read_class_names(root / "classes.txt") if (root / "classes.txt").is_file() else []
    count = count_classes((split.labels.numpy() for split in splits.values()), names)
    classes = names or [str(number) for number in range(count)]
    return Source(
        "webdataset",
        classes,
        splits["train"],
        splits["test"],
        mean=MEAN,
        std=STD,
        meta=splits.get("meta"),
        val=splits.get("val"),
    )


def _find_shards(root: Path, words: tuple[str, ...]) -> list[Path]:
    """Return the shards of a part, which the first of ``words`` that any shard or folder is named by marks."""
    for word in words:
        beside = [path for path in _list_visible(root) if word in re.split(r"[^a-z]+", path.name.lower())]
        files = [path for path in beside if path.is_file()]
        for folder in beside:
            files += [path for path in _list_visible(folder) if path.is_file()] if folder.is_dir() else []
        for path in files:
            if path.name.endswith(COMPRESSED):
                raise UserError(f"{path} is compressed, so its images cannot be read where they lie: decompress the shards.")
        found = sorted(path for path in files if path.suffix == ".tar")
        if found:
            return found
    return []


def _list_visible(folder: Path) -> list[Path]:
    """Return the files and folders in ``folder`` that are not hidden; macOS leaves hidden files in archives."""
    try:
        return [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be read ({error.strerror}): check --data-root.") from None


def _read_split(shards: list[Path], part: str) -> Split:
    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(
            total=len(shards), unit="shard", desc=f"Reading the headers of the {part} shards", disable=None, leave=False
        ) as bar,
    ):
        indices = []
        for index in pool.map(_load_index, shards):
            indices.append(index)
            bar.update()
    lengths = [len(index.size) for index in indices]
    starts = np.cumsum([0, *(len(index.names) for index in indices)]).tolist()
    ends = np.concatenate([index.ends + start for index, start in zip(indices, starts, strict=False)])
    begins = np.concatenate([np.append(0, index.ends[:-1]) + start for index, start in zip(indices, starts, strict=False)])
    names = PathTable(np.concatenate([index.names for index in indices]), begins.astype(np.int64), ends)
    offset, size, labels = (np.concatenate(column) for column in list(zip(*indices, strict=True))[:3])
    return Split(TarImages(shards, np.repeat(np.arange(len(shards)), lengths), offset, size, names), torch.from_numpy(labels))


def _load_index(shard: Path) -> Index:
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
    except Exception:  # missing or damaged: numpy raises OSError, ValueError, KeyError, BadZipFile and more
        index = _scan(shard)
    partial = kept.with_suffix(f".{os.getpid()}.partial")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as stream:
            np.savez(stream, **index._asdict())
        os.replace(partial, kept)
    except OSError:  # the cache only saves time: a run goes on without it
        pass
    return index


class _Sample:
    """The members of one key, by extension."""

    def __init__(self) -> None:
        self.images: dict[str, tuple[int, int]] = {}
        self.labels: dict[str, int] = {}


def _scan(shard: Path) -> Index:
    samples: dict[str, _Sample] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                key, extension = _split_member_name(member.name)
                if not member.isfile() or key is None or METADATA.match(member.name):
                    continue
                kind = extension.rpartition(".")[2]
                if f".{kind}" not in EXTENSIONS and kind not in ("cls", "json"):
                    continue
                sample = samples.setdefault(key, _Sample())
                if extension in sample.images or extension in sample.labels:
                    raise UserError(f"{shard} holds {member.name} twice, so the key {key} is two samples': rename one of them.")
                if f".{kind}" in EXTENSIONS:
                    sample.images[extension] = (member.offset_data, member.size)
                    continue
                content = tar.extractfile(member)
                assert content is not None
                label = _parse_label(content.read(), kind, shard, member.name)
                if label is not None:
                    sample.labels[extension] = label
            end = tar.offset
        with open(shard, "rb") as file:  # tarfile reads a truncated or damaged header as the end of the archive
            file.seek(end)
            whole = file.read(tarfile.BLOCKSIZE) == tarfile.NUL * tarfile.BLOCKSIZE
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"The shard {shard} is damaged or no tar file ({error}): fetch it again, uncompressed.") from None
    if not whole:
        raise UserError(f"The shard {shard} is cut short or damaged: fetch it again.")
    if not samples:
        raise UserError(f"The shard {shard} holds no images: take it away, or write it again.")
    found = [_find_image_and_label(shard, key, sample) for key, sample in samples.items()]
    encoded = [os.fsencode(key) for key in samples]
    places = np.array([place for place, _ in found], dtype=np.int64)
    return Index(
        places[:, 0],
        places[:, 1],
        np.array([label for _, label in found], dtype=np.int64),
        np.frombuffer(b"".join(encoded), dtype=np.uint8),
        np.cumsum([len(key) for key in encoded]).astype(np.int64),
    )


def _find_image_and_label(shard: Path, key: str, sample: _Sample) -> tuple[tuple[int, int], int]:
    """Return the offset and size of the image of a sample, and its label.

    Raises:
        UserError: the image or the label is missing, or several may be meant.
    """
    if not (sample.images and sample.labels):
        raise UserError(f"{shard}: the sample {key} lacks an image, or a label in .cls or .json: write the shard again.")
    image, label = _choose_member(shard, key, sample.images, "images"), _choose_member(shard, key, sample.labels, "labels")
    of_image, of_label = image.rpartition(".")[0], label.rpartition(".")[0]
    if of_label and of_label != of_image:
        raise UserError(f"{shard}: the sample {key} has the image .{image} and the label .{label}: {FIRST_DOT}")
    alike = {value for extension, value in sample.labels.items() if extension.rpartition(".")[0] == of_label}
    if len(alike) > 1:
        raise UserError(f"{shard}: the sample {key} has labels in .cls and .json that differ: write one of them.")
    return sample.images[image], sample.labels[label]


def _choose_member(shard: Path, key: str, members: Mapping[str, object], what: str) -> str:
    """Return the extension of the member that is the image, or the label, of a sample.

    It is the extension without a further dot, such as .jpg beside .mask.png; if there is none, the only one.
    """
    plain = [extension for extension in members if "." not in extension]
    if "cls" in plain:
        return "cls"
    chosen = plain or list(members)
    if len(chosen) > 1:
        way = "keep one of them." if plain else FIRST_DOT
        raise UserError(f"{shard}: the sample {key} has several {what}, .{chosen[0]} and .{chosen[1]}: {way}")
    return chosen[0]


def _split_member_name(name: str) -> tuple[str | None, str]:
    """Split a name at the first dot of its last part, as WebDataset does; the key of a hidden file is None."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem if stem else None, extension.lower()


def _parse_label(content: bytes, extension: str, shard: Path, member: str) -> int | None:
    """Return the class number that a member holds; None for a .json without a label."""
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
