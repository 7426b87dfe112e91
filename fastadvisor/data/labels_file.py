"""Labels from a file: real human noise, in place of generated noise (method.md, "Labels from a file")."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fastadvisor.errors import UserError


def read_labels(name: str, count: int, classes: int) -> NDArray[np.int64]:
    """Read one label per training image, in data-set order or by sample id.

    Args:
        name: a ``.npy`` integer array, a ``.pt`` integer tensor, a ``.txt`` with a label a line, or a ``.csv`` with a
            column ``label`` and, if wanted, ``id`` (without a header: one column of labels).
        count: training images of the data set.
        classes: number of classes C.

    Returns:
        (count,) int64 in 0..C-1.

    Raises:
        UserError: no such file, another format, not integers, the wrong number of them, or one out of range.
    """
    path = Path(os.path.expanduser(name))
    readers = {".npy": _read_npy, ".pt": _read_pt, ".txt": _read_txt, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise UserError(f"Cannot tell the format of the labels {path}: name it .npy, .pt, .txt or .csv.")
    if not os.path.isfile(path):  # Path.is_file raises on a name that is too long
        raise UserError(f"There is no file of labels {path}: check --labels.")
    labels = readers[path.suffix.lower()](path)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(
            f"{path} holds {labels.dtype} values of shape {labels.shape}: labels must be integers in one dimension."
        )
    if len(labels) != count:
        raise UserError(
            f"{path} holds {len(labels)} labels for {count} training images: it needs one for each, in data-set order."
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise UserError(
            f"{path} has the label {labels[wrong[0]]} at position {wrong[0]} (counted from 0): "
            f"labels must lie in 0 to {classes - 1}."
        )
    return labels.astype(np.int64)


def _read_npy(path: Path) -> NDArray[np.integer]:
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except Exception:  # numpy raises OSError, ValueError, EOFError, BadZipFile and more
        raise UserError(f"{path} is not a plain array of numbers: write it with numpy.save.") from None


def _read_pt(path: Path) -> NDArray[np.integer]:
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises UnpicklingError, RuntimeError, EOFError and more on what it cannot or may not load
        value = None
    if not isinstance(value, torch.Tensor) or value.is_floating_point():
        raise UserError(f"{path} does not hold an integer tensor of labels: write it with torch.save(tensor, path).")
    return np.asarray(value.numpy())


def _read_txt(path: Path) -> NDArray[np.integer]:
    return _integers(path, _text(path).rstrip().split("\n"), first_line=1)


def _read_csv(path: Path) -> NDArray[np.integer]:
    try:
        rows = [row for row in csv.reader(_text(path).splitlines()) if row]
    except csv.Error as error:
        raise UserError(f"{path} is not readable as CSV ({error}): write a label a line.") from None
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    if "label" not in header:
        if any(len(row) != 1 for row in rows):
            raise UserError(f"{path} has several columns and no header: name them in its first line, as in 'id,label'.")
        return _integers(path, [row[0] for row in rows], first_line=1)
    for line, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise UserError(f"{path}, row {line}: {len(row)} columns where the header has {len(header)}.")
    labels = _integers(path, [row[header.index("label")] for row in rows[1:]], first_line=2)
    if "id" not in header:
        return labels
    ids = _integers(path, [row[header.index("id")] for row in rows[1:]], first_line=2)
    if not np.array_equal(np.sort(ids), np.arange(len(ids))):
        raise UserError(f"{path}: the column id must hold every sample number from 0 to {len(ids) - 1} once.")
    by_id = np.empty_like(labels)
    by_id[ids] = labels
    return by_id


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte-order mark
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file in UTF-8: save it as one.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check --labels.") from None


def _integers(path: Path, cells: Sequence[str], first_line: int) -> NDArray[np.int64]:
    values = []
    for line, cell in enumerate(cells, start=first_line):
        try:
            values.append(int(cell))
        except ValueError:
            raise UserError(f"{path}, row {line}: {cell.strip()!r} is not an integer.") from None
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError:
        raise UserError(f"{path} has the label {max(values, key=abs)}, which is no class number.") from None
