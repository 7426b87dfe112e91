"""Labels from a file: real human noise, in place of generated noise (method.md, "Labels from a file")."""

import csv
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastadvisor.datasets.class_labels import class_numbers
from fastadvisor.datasets.images import FileImages, Images, TarImages, originals, rows_among
from fastadvisor.datasets.paths import Ints, PathTable
from fastadvisor.datasets.readers.imagefolder import EXTENSIONS
from fastadvisor.errors import UserError, suggest

CLEAN = "clean_label"
"""In a file of several labels, those of the data set itself: proof that it is in the same order."""

LABEL_COLUMNS = ("label", "given_label", "predicted_label", "suggested_label", "corrected_label", "clean_label", "noisy_label")
"""Columns of a CSV that hold labels, cleanlab's names among them."""

PATH_COLUMNS = (
    *("path", "image", "image_path", "image_name", "img", "img_path", "img_name"),
    *("file", "filename", "file_name", "filepath", "file_path", "fname"),
)
"""Columns of a CSV that say which image a row is about."""


class FileLabels(NamedTuple):
    """What a file of labels comes to."""

    labels: Ints
    """(N,) the class of every training image; of one that the file says nothing about the data set's own."""
    notes: tuple[str, ...]
    """What to tell the user."""


class _Written(NamedTuple):
    """Labels as a file holds them."""

    values: Sequence[str] | NDArray[np.integer]
    paths: Sequence[str] | None = None
    """Which image each is of; None: the data set's, in its order."""
    first_row: int | None = None
    """Of the file, counted from 1; None: positions are counted from 0."""

    def place(self, at: int) -> str:
        """Return where the ``at``-th value stands, in words."""
        return f" at position {at} (counted from 0)" if self.first_row is None else f" in row {self.first_row + at}"


_Read = _Written | dict[str, NDArray[np.integer]]


def read_labels(
    name: str,
    images: Images,
    own: Ints,
    classes: Sequence[str],
    key: str | None = None,
    root: str | None = None,
) -> FileLabels:
    """Read labels of the training images: one for each in data-set order, or by sample id, or by path for any of them.

    No file executes anything: a ``.pt`` may hold tensors and numpy arrays of numbers alone.

    Args:
        name: a ``.npy`` array, a ``.pt`` integer tensor or dict of several (CIFAR-10N's ``CIFAR-10_human.pt``), a ``.txt`` with
            a label a line, or a ``.csv`` with a column ``label`` (or one of ``LABEL_COLUMNS``, or ``key``) and, if wanted,
            ``path`` or ``id`` (without a header: one column of labels). Labels are names or numbers of classes
            (:func:`class_numbers`); paths are relative to the folder of the training images, or to ``root``, or absolute.
        images: N training images of the data set.
        own: (N,) their own labels, which ``clean_label`` of a dict must equal.
        classes: C names.
        key: which labels of a file that holds several.
        root: of the data set.

    Raises:
        UserError: no such file, another format, the wrong number of labels, one that is no class, or an image that is not
            there; no such key, none where one is needed, or clean labels that are not the data set's.
    """
    path = Path(name)
    readers: dict[str, Callable[[Path], _Read]] = {
        ".npy": _read_npy,
        ".pt": _read_pt,
        ".txt": _read_txt,
        ".csv": partial(_read_csv, key=key),
    }
    if path.suffix.lower() not in readers:
        raise UserError(f"Cannot tell the format of the labels {path}: name it .npy, .pt, .txt or .csv.")
    if not os.path.isfile(path):  # Path.is_file raises on a name that is too long
        raise UserError(f"There is no file of labels {path}: check --labels.")
    if key is not None and path.suffix.lower() not in (".pt", ".csv"):
        raise UserError(f"--labels-key {key} is for files that hold several labels, and {path} holds one: drop it.")
    written = readers[path.suffix.lower()](path)
    if isinstance(written, dict):
        written = _Written(_one_of(written, path, key, own))
    elif key is not None and path.suffix.lower() == ".pt":
        raise UserError(f"--labels-key {key} is for files that hold several labels, and {path} holds one: drop it.")
    if written.paths is None and len(written.values) != len(own):
        raise UserError(
            f"{path} holds {len(written.values)} labels for {len(own)} training images: it needs one for each, in data-set "
            "order, or, in a CSV, a column path that says which image a row is about."
        )
    found, note = _numbers(written, classes, path)
    notes = [] if note is None else [note]
    if written.paths is None:
        return FileLabels(found, tuple(notes))
    at = _rows(written, found, images, path, root)
    labels = np.where(at >= 0, found[at], own)
    if (at < 0).any():
        some = int((at >= 0).sum())
        notes.append(f"{path} labels {some:,} of {len(own):,} training images; the others keep the data set's own labels.")
    return FileLabels(labels, tuple(notes))


def _numbers(written: _Written, classes: Sequence[str], path: Path) -> tuple[Ints, str | None]:
    """Return the class of each value."""
    values = np.asarray(written.values)
    unique, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)  # by where they first stand, so that messages name the first that is wrong
    texts = [str(value) for value in unique[order].tolist()]
    where = dict(zip(texts, first[order].tolist(), strict=True))
    found = class_numbers(texts, classes, path, lambda label: written.place(where[label]))
    numbers = np.empty(len(unique), dtype=np.int64)
    numbers[order] = found.numbers
    return numbers[inverse.reshape(-1)], found.note


def _rows(written: _Written, numbers: Ints, images: Images, path: Path, root: str | None) -> Ints:
    """Return for each training image the row of the file that is about it, -1 where there is none, (N,)."""
    assert written.paths is not None
    files = originals(images)
    if isinstance(files, FileImages):
        table = PathTable.of(written.paths)
        places = list(dict.fromkeys([files.root, *([] if root is None else [Path(root)]), Path()]))
        if table.absolute().all():  # then they are the same from anywhere
            del places[1:]
        found = [rows_among(FileImages(place, table), files) for place in places]
        whole = [rows for rows in found if (rows >= 0).all()]
        if any(not np.array_equal(whole[0], rows) for rows in whole[1:]):
            raise UserError(
                f"The paths of {path}, as {written.paths[0]}, are of other images from {' and from '.join(map(str, places))}: "
                "write them absolute."
            )
        rows = whole[0] if whole else max(found, key=lambda rows: int((rows >= 0).sum()))
    elif isinstance(files, TarImages):
        known: dict[str, int] = {}
        for row in range(len(files)):
            key = files.names[row]
            known[files.name(row)] = row
            known[key] = row if key not in known else -2
        rows = np.array([known.get(one, -1) for one in written.paths], dtype=np.int64)
        if (rows == -2).any():
            key = written.paths[int(np.flatnonzero(rows == -2)[0])]
            raise UserError(
                f"{path} names the sample {key}, and several shards have one: write SHARD:KEY, as in {files.name(0)}."
            )
    else:
        raise UserError(f"{path} has a column of paths, and the data set's images have none: give it a column id instead.")
    unknown = np.flatnonzero(rows < 0)
    if len(unknown):
        at = int(unknown[0])
        raise UserError(
            f"{path} names {written.paths[at]}{written.place(at)}, which is no training image ({len(unknown)} of {len(rows)} "
            f"are none): write paths as in {images.name(0)}, or delete these rows."
        )
    about = np.full(len(images), -1, dtype=np.int64)
    about[rows[::-1]] = np.arange(len(rows))[::-1]  # the first of several
    again = np.flatnonzero(numbers[about[rows]] != numbers)
    if len(again):
        second = int(again[0])
        raise UserError(
            f"{path} has two labels for {written.paths[second]}, one{written.place(int(about[rows[second]]))} and one"
            f"{written.place(second)}: delete one of them."
        )
    if isinstance(files, FileImages):  # a training list may name an image several times
        about = about[rows_among(files, files)]
    return about


def _read_npy(path: Path) -> _Written:
    try:
        values = np.asarray(np.load(path, allow_pickle=False))
    except Exception:  # numpy raises OSError, ValueError, EOFError, BadZipFile and more
        raise UserError(f"{path} is not a plain array of numbers: write it with numpy.save.") from None
    return _Written(_flat(values, path))


def _flat(values: NDArray[Any], path: Path) -> NDArray[Any]:
    """Return ``values`` if they can be labels: integers, or names, in one dimension."""
    if values.ndim != 1 or values.dtype.kind not in "iuU":
        raise UserError(
            f"{path} holds {values.dtype} values of shape {values.shape}: labels must be integers in one dimension."
        )
    return values


def _read_pt(path: Path) -> _Read:
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises UnpicklingError, RuntimeError, EOFError and more on what it cannot or may not load
        value = None
    if isinstance(value, dict) and value and all(isinstance(name, str) for name in value):
        arrays = {name: _as_array(labels) for name, labels in value.items()}
        found = {name: labels for name, labels in arrays.items() if labels.dtype.kind in "iu" and labels.ndim == 1}
        if found:
            return found
    if not isinstance(value, torch.Tensor) or value.is_floating_point():
        raise UserError(
            f"{path} does not hold an integer tensor of labels, or a dict of several: write it with torch.save(tensor, path)."
        )
    return _Written(_flat(np.asarray(value.numpy()), path))


def _as_array(value: object) -> NDArray[Any]:
    """Return an entry of a dict as an array, what numpy cannot take (lists of several lengths, bfloat16) as an empty one."""
    try:
        return np.asarray(value)
    except Exception:  # numpy raises ValueError, TypeError, RuntimeError and more
        return np.empty(0, dtype=object)


def _numpy_globals() -> list[Any]:
    """Return what a pickled array of numbers names: none of it runs anything but numpy's own unpacking."""
    reconstruct = np.empty(0).__reduce__()[0]
    names = [f"{module}.multiarray._reconstruct" for module in ("numpy.core", "numpy._core")]  # before numpy 2, and since
    kinds = {type(np.dtype(code)) for code in "bBhHiIlLqQfd"}
    return [np.ndarray, np.dtype, *kinds, *((reconstruct, name) for name in names)]


def _one_of(found: dict[str, NDArray[np.integer]], path: Path, key: str | None, own: Ints) -> NDArray[np.integer]:
    """Return the labels that ``key`` names, if the clean ones among ``found`` are the data set's."""
    names = ", ".join(found)
    if key is None:
        raise UserError(f"{path} holds several labels: name one with --labels-key, of {names}.")
    if key not in found:
        raise UserError(f"{path} holds no {key}.{suggest(key, found)} It holds {names}.")
    clean = found.get(CLEAN)
    if clean is not None and len(clean) == len(own):
        wrong = np.flatnonzero(clean != own)
        if len(wrong):
            raise UserError(
                f"{CLEAN} of {path} is not the data set's label for {len(wrong)} of {len(clean)} images (first: image "
                f"{wrong[0]}): the file is for another data set, or for another order of this one."
            )
    return found[key]


def _read_txt(path: Path) -> _Written:
    return _Written([line.strip() for line in _text(path).rstrip().split("\n")])


def _read_csv(path: Path, key: str | None) -> _Written:
    try:
        rows = [(number, row) for number, row in enumerate(csv.reader(_text(path).splitlines()), start=1) if row]
    except csv.Error as error:
        raise UserError(f"{path} is not readable as CSV ({error}): write a label a line.") from None
    header = [cell.strip().lower() for cell in rows[0][1]] if rows else []
    column = _label_column(header, path, key, one_column=all(len(row) == 1 for _, row in rows))
    if column is None:
        return _Written([row[0].strip() for _, row in rows])
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
        return _Written(values, [row[header.index(paths)].strip() for _, row in rows[1:]], first_row=2)
    if "id" not in header:
        _check_order(header, [row for _, row in rows[1:]], path)
        return _Written(values)
    ids = _integers(path, [row[header.index("id")] for _, row in rows[1:]], first_line=2)
    if not np.array_equal(np.sort(ids), np.arange(len(ids))):
        raise UserError(f"{path}: the column id must hold every sample number from 0 to {len(ids) - 1} once.")
    return _Written([values[at] for at in np.argsort(ids).tolist()])


def _check_order(header: Sequence[str], rows: Sequence[Sequence[str]], path: Path) -> None:
    """Raise a UserError if a column of ``rows`` seems to say which image each is about, and so in which order they are."""
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
    """Return which column holds the labels; None where there is one without a header."""
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


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check --labels.") from None
    if b"\0" in data:
        raise UserError(f"{path} is not a text file in UTF-8: save it as one.")
    # Spreadsheets write a byte-order mark; names of files and of classes may be in another encoding.
    return data.decode("utf-8-sig", "surrogateescape")


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
