"""The formats that a file of labels may have: ``.npy``, ``.pt``, ``.txt`` and ``.csv``."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastadvisor.datasets.readers.imagefolder import EXTENSIONS
from fastadvisor.errors import UserError, suggest

LABEL_COLUMNS = ("label", "given_label", "predicted_label", "suggested_label", "corrected_label", "clean_label", "noisy_label")
"""Names of the columns of a CSV that hold labels, including the names that cleanlab uses."""

PATH_COLUMNS = (
    *("path", "image", "image_path", "image_name", "img", "img_path", "img_name"),
    *("file", "filename", "file_name", "filepath", "file_path", "fname"),
)
"""Names of the columns of a CSV that say which image a row labels."""


class WrittenLabels(NamedTuple):
    """Labels as they are written in a file."""

    values: Sequence[str] | NDArray[np.integer]
    paths: Sequence[str] | None = None
    """The image that each label is for; None: the labels are for the images of the data set, in its order."""
    first_row: int | None = None
    """The row of the file, counted from 1, that holds the first label; None: positions are counted from 0."""

    def describe_place(self, at: int) -> str:
        """Return where the label number ``at`` stands in the file, in words."""
        return f" at position {at} (counted from 0)" if self.first_row is None else f" in row {self.first_row + at}"


FileContents = WrittenLabels | dict[str, NDArray[np.integer]]


def read_npy(path: Path) -> WrittenLabels:
    try:
        values = np.asarray(np.load(path, allow_pickle=False))
    except Exception:  # numpy raises OSError, ValueError, EOFError, BadZipFile and more
        raise UserError(f"{path} is not a plain array of numbers: write it with numpy.save.") from None
    return WrittenLabels(_check_array(values, path))


def _check_array(values: NDArray[Any], path: Path) -> NDArray[Any]:
    """Return ``values``; refuse them unless they are integers or names in one dimension."""
    if values.ndim != 1 or values.dtype.kind not in "iuU":
        raise UserError(
            f"{path} holds {values.dtype} values of shape {values.shape}: labels must be integers in one dimension."
        )
    return values


def read_pt(path: Path) -> FileContents:
    try:
        with torch.serialization.safe_globals(_allowed_numpy_globals()):
            value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises UnpicklingError, RuntimeError, EOFError and more on what it cannot or may not load
        value = None
    if isinstance(value, dict) and value and all(isinstance(name, str) for name in value):
        arrays = {name: _to_array(labels) for name, labels in value.items()}
        found = {name: labels for name, labels in arrays.items() if labels.dtype.kind in "iu" and labels.ndim == 1}
        if found:
            return found
    if not isinstance(value, torch.Tensor) or value.is_floating_point():
        raise UserError(
            f"{path} does not hold an integer tensor of labels, or a dict of several: write it with torch.save(tensor, path)."
        )
    return WrittenLabels(_check_array(np.asarray(value.numpy()), path))


def _to_array(value: object) -> NDArray[Any]:
    """Return an entry of a dict as an array; an empty one if numpy cannot convert it (lists of unequal lengths, bfloat16)."""
    try:
        return np.asarray(value)
    except Exception:  # numpy raises ValueError, TypeError, RuntimeError and more
        return np.empty(0, dtype=object)


def _allowed_numpy_globals() -> list[Any]:
    """Return the functions and types that a pickled array of numbers refers to: they run nothing but numpy's own unpacking."""
    reconstruct = np.empty(0).__reduce__()[0]
    names = [f"{module}.multiarray._reconstruct" for module in ("numpy.core", "numpy._core")]  # before numpy 2, and since
    kinds = {type(np.dtype(code)) for code in "bBhHiIlLqQfd"}
    return [np.ndarray, np.dtype, *kinds, *((reconstruct, name) for name in names)]


def read_txt(path: Path) -> WrittenLabels:
    return WrittenLabels([line.strip() for line in _read_text(path).rstrip().split("\n")])


def read_csv(path: Path, key: str | None) -> WrittenLabels:
    try:
        rows = [(number, row) for number, row in enumerate(csv.reader(_read_text(path).splitlines()), start=1) if row]
    except csv.Error as error:
        raise UserError(f"{path} is not readable as CSV ({error}): write a label a line.") from None
    header = [cell.strip().lower() for cell in rows[0][1]] if rows else []
    column = _label_column(header, path, key, one_column=all(len(row) == 1 for _, row in rows))
    if column is None:
        return WrittenLabels([row[0].strip() for _, row in rows])
    for number, row in rows:
        if len(row) != len(header):
            raise UserError(f"{path}, row {number}: {len(row)} columns where the header has {len(header)}.")
    values = [row[column].strip() for _, row in rows[1:]]
    if "" in values:
        raise UserError(f"{path}, row {rows[1 + values.index('')][0]}: it has no label: fill it in, or delete the row.")
    if not values:
        raise UserError(f"{path} is empty: it should hold a label a row.")
    paths = next((name for name in PATH_COLUMNS if name in header), None)
    if paths is not None:
        return WrittenLabels(values, [row[header.index(paths)].strip() for _, row in rows[1:]], first_row=2)
    if "id" not in header:
        _check_order(header, [row for _, row in rows[1:]], path)
        return WrittenLabels(values)
    ids = _parse_integers(path, [row[header.index("id")] for _, row in rows[1:]], first_line=2)
    if not np.array_equal(np.sort(ids), np.arange(len(ids))):
        raise UserError(f"{path}: the column id must hold every sample number from 0 to {len(ids) - 1} once.")
    return WrittenLabels([values[at] for at in np.argsort(ids).tolist()])


def _check_order(header: Sequence[str], rows: Sequence[Sequence[str]], path: Path) -> None:
    """Raise a UserError if a column seems to say which image each row labels: the rows may then be in another order."""
    for column, name in enumerate(header):
        cells = [row[column].strip() for row in rows]
        if len(set(cells)) < max(2, len(cells)) or name in LABEL_COLUMNS:
            continue
        files = all(os.path.splitext(cell)[1].lower() in EXTENSIONS for cell in cells)
        numbers = all(cell.isascii() and cell.isdigit() and len(cell) < 10 for cell in cells)
        if files or (numbers and [int(cell) - int(cells[0]) for cell in cells] != list(range(len(cells)))):
            raise UserError(
                f"{path} has no column path or id, and its column {name or 'without a name'} ({cells[0]}, {cells[1]}, ...) "
                "seems to say which image a row is about: call it path (of files) or id (of sample numbers from 0), or delete "
                "it to have the labels taken in data-set order."
            )


def _label_column(header: Sequence[str], path: Path, key: str | None, *, one_column: bool) -> int | None:
    """Return which column holds the labels; None if there is only one column, without a header."""
    if key is not None:
        if key.lower() not in header:
            raise UserError(f"{path} has no column {key}.{suggest(key, header)} Its first line names {', '.join(header)}.")
        return header.index(key.lower())
    known = [name for name in header if name in LABEL_COLUMNS]
    if "label" in known or len(known) == 1:
        return header.index("label" if "label" in known else known[0])
    if known:
        raise UserError(f"{path} holds several labels: name one with --labels-key, of {', '.join(known)}.")
    if one_column:
        return None
    raise UserError(
        f"{path} has several columns and none called label: name them in its first line, as in 'path,label', or name one with "
        "--labels-key."
    )


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check --labels.") from None
    if b"\0" in data:
        raise UserError(f"{path} is not a text file in UTF-8: save it as one.")
    # Spreadsheets write a byte-order mark, and the names of files and classes may be in another encoding.
    return data.decode("utf-8-sig", "surrogateescape")


def _parse_integers(path: Path, cells: Sequence[str], first_line: int) -> NDArray[np.int64]:
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
