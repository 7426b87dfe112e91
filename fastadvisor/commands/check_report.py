"""The report of ``fastadvisor data check``: its numbers, and the tables, sentences and files that are made of them."""

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastadvisor.errors import UserError
from fastadvisor.loading import unreadable
from fastadvisor.loading.unreadable import BadImages

MOST_CLASSES = 20
"""Most classes that are listed one by one; --output lists all."""

SHOWN = 3
"""Number of bad images of a part that the report names; --output lists all."""


@dataclass
class PartReport:
    """The contents of one part (training, meta, test, val)."""

    images: int
    per_class: dict[str, int]
    imbalance_factor: float | None
    """The size of the largest class over that of the smallest; None if a class is empty."""
    missing: int
    """Number of files that are missing or empty."""
    broken: int
    """Number of files that cannot be decoded."""
    unusual: dict[str, int]
    """Number of images that are unusual but can be read, by kind, such as PNGs named .jpg or CMYK images."""
    shorter_side: tuple[int, int, int] | None
    """Smallest, median and largest shorter side of the images, in pixels."""
    duplicates: int
    """Number of images that repeat an earlier image of the part, byte for byte."""


@dataclass
class Report:
    """The results of ``fastadvisor data check``."""

    name: str
    classes: int
    parts: dict[str, PartReport]
    conflicts: int
    """Number of training images that occur again with another label."""
    shared: dict[str, int]
    """Number of images that two parts share, by their names, as in "meta in training"."""
    protocol: dict[str, Any] | None
    """What a run with these settings would train on; None if it would be refused."""
    problems: list[str]
    """Sentences about what a run refuses, or should refuse."""
    notes: list[str]
    """Sentences about what is worth knowing."""
    bad: list[BadImages] = field(default_factory=list, repr=False)
    repeated: list[tuple[int, str, int, int, str]] = field(default_factory=list, repr=False)
    """(group, part, id, label, name) of every image that occurs more than once."""

    def rows(self) -> list[tuple[str, ...]]:
        """Return a table of the parts."""
        rows: list[tuple[str, ...]] = [
            ("part", "images", "per class", "imbalance", "missing", "broken", "duplicates", "shorter side")
        ]
        for name, part in self.parts.items():
            counts = part.per_class.values()
            sides = "-" if part.shorter_side is None else "{} .. {} .. {}".format(*part.shorter_side)
            factor = "-" if part.imbalance_factor is None else f"{part.imbalance_factor:.4g}"
            numbers = (f"{number:,}" for number in (part.missing, part.broken, part.duplicates))
            rows.append((name, f"{part.images:,}", f"{min(counts):,} .. {max(counts):,}", factor, *numbers, sides))
        return rows

    def class_rows(self) -> list[tuple[str, ...]]:
        """Return a table of the images of each class; of many classes, those with the most and the fewest training images."""
        counts = [part.per_class for part in self.parts.values()]
        names = list(counts[0])
        order = list(range(len(names)))
        if len(names) > MOST_CLASSES:
            order = sorted(order, key=lambda label: -counts[0][names[label]])
            order = [*order[: MOST_CLASSES // 2], *order[-MOST_CLASSES // 2 :]]
        rows: list[tuple[str, ...]] = [("label", "class", *self.parts)]
        rows += [(str(label), names[label], *(f"{part[names[label]]:,}" for part in counts)) for label in order]
        if len(names) > MOST_CLASSES:
            rows.insert(1 + MOST_CLASSES // 2, ("...",) * len(rows[0]))
        return rows

    def remarks(self) -> list[str]:
        """Return all other results as sentences; the first problem is left to the caller."""
        lines = []
        for name, part in self.parts.items():
            if part.unusual:
                kinds = ", ".join(f"{count:,} {kind}" for kind, count in part.unusual.items())
                lines.append(f"Among the {name} images, read all the same: {kinds}.")
        for found in self.bad:
            lines += [
                f"Cannot read {found.images.name(row)} ({found.part}, id {row}): {why}." for row, why in found.first(SHOWN)
            ]
        if self.protocol is not None:
            shots = " / ".join(f"{count:,}" for count in self.protocol["many_medium_few_shot_classes"])
            lines.append(
                f"A run with these settings trains on {self.protocol['training']:,} images (imbalance factor "
                f"{self.protocol['imbalance_factor']:.4g}, many/medium/few-shot classes {shots}, "
                f"injected noise {self.protocol['noise_rate']:.1%}), with {self.protocol['meta']:,} meta images."
            )
        return lines + [f"Note: {note}" for note in self.notes] + [f"Problem: {problem}" for problem in self.problems[1:]]

    def write(self, folder: Path) -> None:
        """Write ``check.json``, ``bad_images.csv`` and ``duplicates.csv``.

        Raises:
            UserError: the files cannot be written.
        """
        told = {key: value for key, value in vars(self).items() if key not in ("bad", "repeated")}
        told["parts"] = {name: vars(part) for name, part in self.parts.items()}
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(("group", "part", "id", "label", "image"))
        writer.writerows(self.repeated)
        make_folder(folder)
        try:
            for name, text in (
                ("check.json", json.dumps(told, indent=2)),
                ("bad_images.csv", unreadable.to_csv(self.bad)),
                ("duplicates.csv", table.getvalue()),
            ):
                (folder / name).write_text(text, encoding="utf-8", errors="surrogateescape")
        except OSError as error:
            raise _cannot_write(folder, error) from None


def make_folder(folder: Path) -> None:
    """Make the folder of a report.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from None


def _cannot_write(folder: Path, error: OSError) -> UserError:
    return UserError(f"Cannot write the report to {folder} ({error.strerror}): choose another --output.")
