"""Parsers of list files, which several readers share: text lists of millions of lines, CSV, and names of classes."""

import csv
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastadvisor.datasets.paths import Bytes, Ints, PathTable
from fastadvisor.errors import UserError

NEWLINE, SPACE, TAB, RETURN, ZERO, SLASH, BACKSLASH = b"\n \t\r0/\\"
BOM = b"\xef\xbb\xbf"
MOST_DIGITS = 9
PARTS = {"train": "train", "training": "train", "meta": "meta", "test": "test"} | dict.fromkeys(
    ("val", "valid", "validation"), "val"
)
"""The words that the column split of a CSV may hold, and the part that each of them means."""


class Listed(NamedTuple):
    """Paths and class numbers of a list, (N,) each."""

    paths: PathTable
    labels: Ints


class Table(NamedTuple):
    """The columns of a CSV: paths, labels and, if there is such a column, splits; (N,) each."""

    paths: PathTable
    labels: Ints
    """int64, indices into ``names``."""
    names: list[str]
    """The distinct labels, as they are written."""
    splits: NDArray[np.int8]
    """Indices into ``parts``; zeros if there is no such column."""
    parts: list[str]
    """The parts that occur, of train, meta, test and val; empty if there is no such column."""


def read_list(path: Path) -> Listed:
    """Read lines of ``relative/path label``, a million of them in about a second.

    The label is what follows the last blank, so paths may contain blanks. Windows line ends, a byte-order mark, tabs, blank
    lines and, in a list without any slash, backslashes as separators are accepted. Paths are kept as the bytes of the file.

    Raises:
        UserError: the file is missing, empty or not text, or a line lacks a path or a class number.
    """
    buffer, start, stop, line = _read_lines(path)
    digits, labels = stop.copy(), np.zeros(len(stop), dtype=np.int64)
    for place in range(MOST_DIGITS):
        digit = buffer[np.maximum(digits - 1, 0)] - np.uint8(ZERO)  # characters below "0" wrap around to large numbers
        more = (digits > start) & (digit < 10)
        if not more.any():
            break
        labels += np.where(more, digit.astype(np.int64) * 10**place, 0)
        digits -= more
    before = buffer[np.maximum(digits - 1, 0)]
    wrong = (digits == stop) | (digits == start) | ((before != SPACE) & (before != TAB))
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        text = os.fsdecode(buffer[start[first] : stop[first]].tobytes())
        raise UserError(
            f"{path}, line {line[first]}: {text[:100]!r} is not a path, a blank and a class number: "
            "write it as in 'folder/image.jpg 3'."
        )
    return Listed(PathTable(buffer, start, _strip_blanks(buffer, start, digits)), labels)


def read_keys(path: Path) -> PathTable:
    """Read one path from each line; everything else is as in :func:`read_list`."""
    buffer, start, stop, _ = _read_lines(path)
    return PathTable(buffer, start, stop)


def _read_lines(path: Path) -> tuple[Bytes, Ints, Ints, Ints]:
    """Return the bytes of a text, and for each line that is not blank its start, its stop, and its number from 1."""
    try:
        buffer = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise UserError(f"The list {path} cannot be read ({error.strerror}).") from None
    if not len(buffer):
        raise UserError(f"The list {path} is empty: it should hold an image a line.")
    if (buffer == 0).any():
        raise UserError(f"{path} is not a text file: it should hold a path and a class number a line.")
    if (buffer == BACKSLASH).any() and not (buffer == SLASH).any():
        buffer = np.where(buffer == BACKSLASH, np.uint8(SLASH), buffer)
    begin = len(BOM) if buffer[:3].tobytes() == BOM else 0
    ends = np.flatnonzero(buffer == NEWLINE).astype(np.int64)
    start, stop = np.append(begin, ends + 1), np.append(ends, len(buffer))
    stop = _strip_blanks(buffer, start, stop)
    while True:
        blank = (start < stop) & _is_blank(buffer[np.minimum(start, len(buffer) - 1)])
        if not blank.any():
            break
        start = start + blank
    kept = np.flatnonzero(stop > start)
    if not len(kept):
        raise UserError(f"The list {path} is empty: it should hold an image a line.")
    return buffer, start[kept], stop[kept], kept + 1


def _strip_blanks(buffer: Bytes, start: Ints, stop: Ints) -> Ints:
    """Return ``stop`` moved back over the blanks at the end of each line."""
    while True:
        blank = (stop > start) & _is_blank(buffer[np.maximum(stop - 1, 0)])
        if not blank.any():
            return stop
        stop = stop - blank


def _is_blank(characters: Bytes) -> NDArray[np.bool_]:
    return (characters == SPACE) | (characters == TAB) | (characters == RETURN)


def read_csv(path: Path) -> Table:
    """Read a CSV with the columns ``path``, ``label`` and, if there is one, ``split``; other columns are ignored.

    Raises:
        UserError: the file cannot be read or is empty, a column is missing, or a row lacks a cell or has an unknown split.
    """
    labels, splits = array("q"), array("b")
    names: dict[str, int] = {}
    parts: dict[str, int] = {}

    def paths(rows: Iterator[list[str]], columns: list[int]) -> Iterator[str]:
        for number, row in enumerate(rows, start=2):
            if not row:
                continue
            if len(row) <= max(columns) or not row[columns[0]].strip() or not row[columns[1]].strip():
                raise UserError(f"{path}, row {number}: it lacks a path or a label: fill it in, or delete the row.")
            labels.append(names.setdefault(row[columns[1]].strip(), len(names)))
            if len(columns) > 2:
                word = row[columns[2]].strip()
                if word.lower() not in PARTS:
                    raise UserError(f"{path}, row {number}: the split {word!r} is not one of train, meta, val and test.")
                splits.append(parts.setdefault(PARTS[word.lower()], len(parts)))
            yield row[columns[0]].strip()

    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = csv.reader(file)
            header = [cell.strip().lower() for cell in next(rows, [])]
            for column in ("path", "label"):
                if column not in header:
                    raise UserError(f"{path} has no column {column!r}: its first line must be path,label or path,label,split.")
            columns = [header.index(column) for column in ("path", "label", "split") if column in header]
            table = PathTable.of(paths(rows, columns))
    except (OSError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV ({getattr(error, 'strerror', None) or error}).") from None
    if not len(table):
        raise UserError(f"{path} is empty: it should hold an image a row.")
    if (table.buffer == 0).any():
        raise UserError(f"{path} is not a text file: it should hold a path and a label a row.")
    split = np.frombuffer(splits, dtype=np.int8) if parts else np.zeros(len(table), dtype=np.int8)
    return Table(table, np.frombuffer(labels, dtype=np.int64), list(names), split, list(parts))


def read_names(path: Path) -> list[str]:
    """Return the lines of a text file that are not blank.

    Raises:
        UserError: the file cannot be read as text.
    """
    return [name for _, name in _read_numbered_lines(path)]


def read_class_names(path: Path) -> list[str]:
    """Return the names of the classes, in the order of their numbers; the file holds one on each line.

    Raises:
        UserError: the file cannot be read as text, or two classes have the same name.
    """
    lines: dict[str, int] = {}
    for number, name in _read_numbered_lines(path):
        if name in lines:
            raise UserError(f"{path} calls two classes {name!r}, in line {lines[name]} and line {number}: rename one of them.")
        lines[name] = number
    return list(lines)


def _read_numbered_lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error}).") from None
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]


def count_classes(parts: Iterable[Ints], names: Sequence[str] = ()) -> int:
    """Return the number of classes: the number of ``names`` or, without names, the highest label plus 1.

    Raises:
        UserError: the highest label is too high for a class number, as there are not that many images.
    """
    if names:
        return len(names)
    highest, images = 0, 0
    for labels in parts:
        highest, images = max(highest, int(labels.max(initial=0))), images + len(labels)
    if highest >= max(images, 1):  # names for a billion classes would fill the memory
        raise UserError(f"The highest class number is {highest}, and there are {images} images: number the classes from 0 on.")
    return highest + 1
