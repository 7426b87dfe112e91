"""``fastadvisor data check``: find what is wrong with a data set before a long training does."""

import io
import warnings
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fastadvisor.commands.check_report import PartReport, Report
from fastadvisor.config import CheckConfig
from fastadvisor.datasets.images import ArrayImages, digest_bytes
from fastadvisor.datasets.paths import Ints
from fastadvisor.datasets.protocol import prepare
from fastadvisor.datasets.types import Source, Split
from fastadvisor.errors import UserError
from fastadvisor.loading.decode import Unreadable, decode_rgb, read_encoded
from fastadvisor.loading.unreadable import BadImages
from fastadvisor.runtime.environment import cpu_cores

CHUNK = 256
"""Number of images that a thread inspects before it reports."""

MANY, FEW = 100, 20
"""A class with more than MANY images is many-shot, one with fewer than FEW is few-shot, all others are medium-shot."""

Digests = NDArray[np.void]


class _PartFacts(NamedTuple):
    """What was found out about the images of a part."""

    digests: Digests
    reasons: dict[int, str]
    unusual: Counter[str]
    sides: list[int]


class _ImageFacts(NamedTuple):
    """What was found out about one image."""

    digest: bytes
    reason: str | None = None
    unusual: tuple[str, ...] = ()
    side: int | None = None


def check_data(source: Source, config: CheckConfig) -> Report:
    """Inspect every image of ``source`` and apply the protocols of ``config`` to it; each file is read once.

    Args:
        source: the data set, as a reader returns it.
        config: the settings of the check and the protocols; with ``decode`` off, files are read but not decoded.
    """
    splits = {"training": source.train, "meta": source.meta, "test": source.test, "val": source.val}
    parts = {name: split for name, split in splits.items() if split is not None}
    seen = {name: _inspect_all(name, split, decode=config.decode) for name, split in parts.items()}
    counts = {name: _count_labels(split.labels, len(source.classes)) for name, split in parts.items()}
    groups = _group_by_content(seen)
    reports = {
        name: _report_part(split, seen[name], dict(zip(source.classes, counts[name].tolist(), strict=True)), groups.of[name])
        for name, split in parts.items()
    }
    report = Report(source.name, len(source.classes), reports, 0, {}, None, [], list(source.notes))
    for name, split in parts.items():
        found = BadImages(name, split.images, len(split), config.max_bad_fraction)
        report.bad.append(found)
        try:
            found.add(seen[name].reasons)
        except UserError as error:
            report.problems.append(str(error))
        if counts[name].min() == 0 and name != "meta":
            first, empty = source.classes[int(counts[name].argmin())], int((counts[name] == 0).sum())
            line = f"{empty} of {len(source.classes)} classes have no {name} images (first: {first})."
            (report.problems if name == "training" else report.notes).append(line)
    _compare_parts(report, parts, groups, source.meta_rows)
    _apply_protocol(report, source, config, seen["training"].digests)
    return report


def _inspect_all(name: str, split: Split, *, decode: bool) -> _PartFacts:
    images, count = split.images, len(split)
    digests = np.zeros(count, dtype="V16")
    reasons: dict[int, str] = {}
    unusual: Counter[str] = Counter()
    sides: list[int] = []

    def look(start: int) -> list[_ImageFacts]:
        return [_inspect(split, row, decode=decode) for row in range(start, min(start + CHUNK, count))]

    with (
        ThreadPoolExecutor(cpu_cores()) as pool,
        tqdm(total=count, unit="image", desc=f"Looking at the {name} images", disable=None, leave=False) as bar,
    ):
        starts = range(0, count, CHUNK)
        for start, looks in zip(starts, pool.map(look, starts), strict=True):
            for row, (digest, reason, odd, side) in enumerate(looks, start=start):
                digests[row] = np.void(digest)
                unusual.update(odd)
                if reason is not None:
                    reasons[row] = reason
                if side is not None:
                    sides.append(side)
            bar.update(len(looks))
    if isinstance(images, ArrayImages):
        sides = [min(images.pixels.shape[1:3])]
    return _PartFacts(digests, reasons, unusual, sides)


def _inspect(split: Split, row: int, *, decode: bool) -> _ImageFacts:
    images = split.images
    try:
        if isinstance(images, ArrayImages):
            return _ImageFacts(images.digest(row))
        data = read_encoded(images, row)
        digest = digest_bytes(data)
        if not decode:
            return _ImageFacts(digest)
        image = decode_rgb(data)
        return _ImageFacts(digest, None, _find_oddities(data, images.name(row)), min(image.size))
    except Unreadable as reason:
        return _ImageFacts(bytes(16), str(reason))


def _find_oddities(data: bytes, name: str) -> tuple[str, ...]:
    """Return in which ways an image that can be decoded is unusual, such as a PNG named .jpg or a CMYK image."""
    found = []
    with Image.open(io.BytesIO(data)) as image:
        suffix = Path(name).suffix.lower()
        if suffix in (".jpg", ".jpeg") and image.format not in ("JPEG", "MPO"):
            found.append(f"{image.format} named {suffix}")
        if image.mode == "CMYK":
            found.append("CMYK")
        elif image.mode in ("L", "1", "LA"):
            found.append("grayscale")
        elif image.mode.startswith("I"):
            found.append("16-bit")
        if image.getexif().get(0x0112, 1) != 1:
            found.append("turned by EXIF")
    return tuple(found)


def _count_labels(labels: Tensor, classes: int) -> Ints:
    return np.asarray(torch.bincount(labels[(labels >= 0) & (labels < classes)], minlength=classes).numpy())


class _Groups(NamedTuple):
    """The images of all parts, grouped by content."""

    of: dict[str, Ints]
    """The group of each image, (N,) int64 for each part; -1 if the image cannot be read."""
    sizes: Ints
    """The number of images in each group, (G,) int64."""


def _group_by_content(seen: Mapping[str, _PartFacts]) -> _Groups:
    digests = np.concatenate([part.digests for part in seen.values()])
    _, group = np.unique(digests, return_inverse=True)
    starts = np.cumsum([len(part.digests) for part in seen.values()])[:-1]
    of = dict(zip(seen, np.split(group.reshape(-1).astype(np.int64), starts), strict=True))
    for name, part in seen.items():
        of[name][list(part.reasons)] = -1
    every = np.concatenate(list(of.values()))
    return _Groups(of, np.bincount(every[every >= 0], minlength=int(every.max(initial=-1)) + 1))


def _report_part(split: Split, seen: _PartFacts, per_class: dict[str, int], group: Ints) -> PartReport:
    sizes = split.images.sizes(np.array(list(seen.reasons), dtype=np.int64))
    missing = int((sizes <= 0).sum())
    readable = group[group >= 0]
    least, most = min(per_class.values()), max(per_class.values())
    return PartReport(
        images=len(split),
        per_class=per_class,
        imbalance_factor=most / least if least else None,
        missing=missing,
        broken=len(seen.reasons) - missing,
        unusual=dict(seen.unusual.most_common()),
        shorter_side=(min(seen.sides), int(np.median(seen.sides)), max(seen.sides)) if seen.sides else None,
        duplicates=len(readable) - len(np.unique(readable)),
    )


def _compare_parts(report: Report, parts: Mapping[str, Split], groups: _Groups, meta_rows: Ints | None) -> None:
    """Fill in which images occur more than once; ``meta_rows`` is that of :class:`Source`."""
    of = dict(groups.of)
    if meta_rows is not None:  # training images that a run moves to the meta-set
        of["training"] = np.delete(of["training"], meta_rows[meta_rows >= 0])
    pairs = (
        ("meta", "training"),
        ("meta", "test"),
        ("training", "test"),
        ("meta", "val"),
        ("training", "val"),
        ("val", "test"),
    )
    for one, other in pairs:
        if one in parts and other in parts:
            report.shared[f"{one} in {other}"] = int((np.isin(of[one], of[other]) & (of[one] >= 0)).sum())
    for pair, count in report.shared.items():
        if count:
            line = f"{count:,} {pair.replace(' in ', ' images are among the ')} images"
            if pair == "meta in training":
                report.problems.append(f"{line}: remove them from one of the two.")
            else:
                report.notes.append(f"{line}: test accuracy will flatter a run; remove them from one of the two.")
    labels, group = parts["training"].labels.numpy(), groups.of["training"]
    different = np.unique(np.stack([group, labels], axis=1)[group >= 0], axis=0)
    conflicting = np.flatnonzero(np.bincount(different[:, 0], minlength=len(groups.sizes)) > 1)
    report.conflicts = int(np.isin(group, conflicting).sum())
    if report.conflicts:
        report.notes.append(
            f"{report.conflicts:,} training images are there more than once under different labels: at least one is wrong."
        )
    repeated = np.flatnonzero(groups.sizes > 1)
    for name, split in parts.items():
        for row in np.flatnonzero(np.isin(groups.of[name], repeated)).tolist():
            report.repeated.append((int(groups.of[name][row]), name, row, int(split.labels[row]), split.images.name(row)))
    report.repeated.sort()


def _apply_protocol(report: Report, source: Source, config: CheckConfig, digests: Digests) -> None:
    """Fill in what a run with these settings would train on."""
    with warnings.catch_warnings(record=True):  # of images that parts share, which the report tells already
        warnings.simplefilter("always")
        try:
            data = prepare(source, config, config.seed)
        except UserError as error:
            if not any(line.startswith("meta") or " meta images are" in line for line in report.problems):
                report.problems.append(str(error))
            return
    counts = data.true_class_counts()
    least, most = int(counts.min()), int(counts.max())
    report.protocol = {
        "training": len(data.train_ids),
        "meta": len(data.meta_ids),
        "imbalance_factor": most / least,
        "many_medium_few_shot_classes": [
            int((counts > MANY).sum()),
            int(((counts >= FEW) & (counts <= MANY)).sum()),
            int((counts < FEW).sum()),
        ],
        "noise_rate": data.noise_rate(),
    }
    if data.meta_held_out:
        held, kept = (digests[ids.numpy()] for ids in (data.meta_ids, data.train_ids))
        shared = int(np.isin(held, kept[kept != np.zeros(1, dtype="V16")]).sum())
        if shared:
            report.problems.append(
                f"{shared:,} of the {len(held)} images that are held out as the meta-set are there again among the "
                "training images: remove the copies (duplicates.csv of --output lists them)."
            )
