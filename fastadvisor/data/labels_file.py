"""Labels from a file: real human noise, in place of generated noise (method.md, "Labels from a file")."""

import csv
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastadvisor.errors import UserError, nearest

_Labels = NDArray[np.integer] | dict[str, NDArray[np.integer]]

CLEAN = "clean_label"
"""In a file of several labels, those of the data set itself: proof that it is in the same order."""


def read_labels(
    name: str, count: int, classes: int, key: str | None = None, true_labels: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Read one label per training image, in data-set order or by sample id.

    No file executes anything: a ``.pt`` may hold tensors and numpy arrays of numbers alone.

    Args:
        name: a ``.npy`` integer array, a ``.pt`` integer tensor or dict of several (CIFAR-10N's ``CIFAR-10_human.pt``),
            a ``.txt`` with a label a line, or a ``.csv`` with a column ``label`` (or ``key``) and, if wanted, ``id``
            (without a header: one column of labels).
        count: training images of the data set.
        classes: number of classes C.
        key: which labels of a file that holds several.
        true_labels: (count,) the data set's own, which ``clean_label`` of such a file must equal.

    Returns:
        (count,) int64 in 0..C-1.

    Raises:
        UserError: no such file, another format, not integers, the wrong number of them, or one out of range; no such key,
            none where one is needed, or clean labels that are not the data set's.
    """
    path = Path(os.path.expanduser(name))
    readers: dict[str, Callable[[Path], _Labels]] = {
        ".npy": _read_npy,
        ".pt": _read_pt,
        ".txt": _read_txt,
        ".csv": partial(_read_csv, key=key or "label"),
    }
    if path.suffix.lower() not in readers:
        raise UserError(f"Cannot tell the format of the labels {path}: name it .npy, .pt, .txt or .csv.")
    if not os.path.isfile(path):  # Path.is_file raises on a name that is too long
        raise UserError(f"There is no file of labels {path}: check --labels.")
    if key is not None and path.suffix.lower() not in (".pt", ".csv"):
        raise UserError(f"--labels-key {key} is for files that hold several labels, and {path} holds one: drop it.")
    labels = readers[path.suffix.lower()](path)
    if isinstance(labels, dict):
        labels = _one_of(labels, path, key, true_labels)
    elif key is not None and path.suffix.lower() == ".pt":
        raise UserError(f"--labels-key {key} is for files that hold several labels, and {path} holds one: drop it.")
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


def _read_pt(path: Path) -> _Labels:
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises UnpicklingError, RuntimeError, EOFError and more on what it cannot or may not load
        value = None
    if isinstance(value, dict) and value and all(isinstance(name, str) for name in value):
        arrays = {name: np.asarray(labels) for name, labels in value.items()}
        found = {name: labels for name, labels in arrays.items() if labels.dtype.kind in "iu" and labels.ndim == 1}
        if found:
            return found
    if not isinstance(value, torch.Tensor) or value.is_floating_point():
        raise UserError(
            f"{path} does not hold an integer tensor of labels, or a dict of several: write it with torch.save(tensor, path)."
        )
    return np.asarray(value.numpy())


def _numpy_globals() -> list[Any]:
    """Return what a pickled array of numbers names: none of it runs anything but numpy's own unpacking."""
    reconstruct = np.empty(0).__reduce__()[0]
    names = [f"{module}.multiarray._reconstruct" for module in ("numpy.core", "numpy._core")]  # before numpy 2, and since
    kinds = {type(np.dtype(code)) for code in "bBhHiIlLqQfd"}
    return [np.ndarray, np.dtype, *kinds, *((reconstruct, name) for name in names)]


def _one_of(
    found: dict[str, NDArray[np.integer]], path: Path, key: str | None, true_labels: NDArray[np.int64] | None
) -> NDArray[np.integer]:
    """Return the labels that ``key`` names, if the clean ones among ``found`` are the data set's."""
    names = ", ".join(found)
    if key is None:
        raise UserError(f"{path} holds several labels: name one with --labels-key, of {names}.")
    if key not in found:
        raise UserError(f"{path} holds no {key}.{nearest(key, found)} It holds {names}.")
    clean = found.get(CLEAN)
    if clean is not None and true_labels is not None and len(clean) == len(true_labels):
        wrong = np.flatnonzero(clean != true_labels)
        if len(wrong):
            raise UserError(
                f"{CLEAN} of {path} is not the data set's label for {len(wrong)} of {len(clean)} images (first: image "
                f"{wrong[0]}): the file is for another data set, or for another order of this one."
            )
    return found[key]


def _read_txt(path: Path) -> NDArray[np.integer]:
    return _integers(path, _text(path).rstrip().split("\n"), first_line=1)


def _read_csv(path: Path, key: str) -> NDArray[np.integer]:
    try:
        rows = [row for row in csv.reader(_text(path).splitlines()) if row]
    except csv.Error as error:
        raise UserError(f"{path} is not readable as CSV ({error}): write a label a line.") from None
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    if key.lower() not in header:
        if key != "label":
            raise UserError(f"{path} has no column {key}.{nearest(key, header)} Its first line names {', '.join(header)}.")
        if any(len(row) != 1 for row in rows):
            raise UserError(f"{path} has several columns and no header: name them in its first line, as in 'id,label'.")
        return _integers(path, [row[0] for row in rows], first_line=1)
    for line, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise UserError(f"{path}, row {line}: {len(row)} columns where the header has {len(header)}.")
    labels = _integers(path, [row[header.index(key.lower())] for row in rows[1:]], first_line=2)
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
