"""Labels from a file: real human noise, in place of generated noise (method.md, "Labels from a file")."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastadvisor.datasets.class_labels import resolve_labels
from fastadvisor.datasets.images import FileImages, Images, TarImages, find_originals, match_files
from fastadvisor.datasets.label_formats import FileContents, WrittenLabels, read_csv, read_npy, read_pt, read_txt
from fastadvisor.datasets.paths import Ints, PathTable
from fastadvisor.errors import UserError, suggest

CLEAN = "clean_label"
"""Name of the entry that holds the data set's own labels, which shows whether the file is in the order of the data set."""


class FileLabels(NamedTuple):
    """The labels of the training images according to a file."""

    labels: Ints
    """(N,) int64: the class of every training image; the data set's own label where the file says nothing."""
    notes: tuple[str, ...]
    """What to tell the user, a sentence each."""


def read_labels(
    name: str,
    images: Images,
    own: Ints,
    classes: Sequence[str],
    key: str | None = None,
    root: str | None = None,
) -> FileLabels:
    """Read labels of the training images: one for each image in data-set order or by sample id, or by path for any of them.

    Reading a file never runs code from it: a ``.pt`` may hold only tensors and numpy arrays of numbers.

    Args:
        name: a ``.npy`` array, a ``.pt`` integer tensor or dict of several (CIFAR-10N's ``CIFAR-10_human.pt``), a ``.txt`` with
            a label a line, or a ``.csv`` with a column ``label`` (or one of ``LABEL_COLUMNS``, or ``key``) and, if wanted,
            ``path`` or ``id`` (without a header: one column of labels). Labels are names or numbers of classes
            (:func:`resolve_labels`); paths are relative to the folder of the training images, or to ``root``, or absolute.
        images: the N training images of the data set.
        own: (N,) int64, their own labels, which ``clean_label`` of a dict must equal.
        classes: C names.
        key: which labels to take from a file that holds several.
        root: the folder of the data set.

    Raises:
        UserError: the file is missing or of another format, has the wrong number of labels, or names an unknown class or image;
            the key is missing or unknown; or the clean labels are not those of the data set.
    """
    path = Path(name)
    readers: dict[str, Callable[[Path], FileContents]] = {
        ".npy": read_npy,
        ".pt": read_pt,
        ".txt": read_txt,
        ".csv": partial(read_csv, key=key),
    }
    if path.suffix.lower() not in readers:
        raise UserError(f"Cannot tell the format of the labels {path}: name it .npy, .pt, .txt or .csv.")
    if not os.path.isfile(path):  # Path.is_file raises on a name that is too long
        raise UserError(f"There is no file of labels {path}: check --labels.")
    if key is not None and path.suffix.lower() not in (".pt", ".csv"):
        raise UserError(f"--labels-key {key} is for files that hold several labels, and {path} holds one: drop it.")
    written = readers[path.suffix.lower()](path)
    if isinstance(written, dict):
        written = WrittenLabels(_select_labels(written, path, key, own))
    elif key is not None and path.suffix.lower() == ".pt":
        raise UserError(f"--labels-key {key} is for files that hold several labels, and {path} holds one: drop it.")
    if written.paths is None and len(written.values) != len(own):
        raise UserError(
            f"{path} holds {len(written.values)} labels for {len(own)} training images: it needs one for each, in data-set "
            "order, or, in a CSV, a column path that says which image a row is about."
        )
    found, note = _to_class_numbers(written, classes, path)
    notes = [] if note is None else [note]
    if written.paths is None:
        return FileLabels(found, tuple(notes))
    at = _match_rows(written, found, images, path, root)
    labels = np.where(at >= 0, found[at], own)
    if (at < 0).any():
        some = int((at >= 0).sum())
        notes.append(f"{path} labels {some:,} of {len(own):,} training images; the others keep the data set's own labels.")
    return FileLabels(labels, tuple(notes))


def _to_class_numbers(written: WrittenLabels, classes: Sequence[str], path: Path) -> tuple[Ints, str | None]:
    """Return the class number of each label, (L,) int64, and what to tell the user about how they were read."""
    values = np.asarray(written.values)
    unique, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)  # in order of first occurrence, so that messages name the first one that is wrong
    texts = [str(value) for value in unique[order].tolist()]
    where = dict(zip(texts, first[order].tolist(), strict=True))
    found = resolve_labels(texts, classes, path, lambda label: written.describe_place(where[label]))
    numbers = np.empty(len(unique), dtype=np.int64)
    numbers[order] = found.numbers
    return numbers[inverse.reshape(-1)], found.note


def _match_rows(written: WrittenLabels, numbers: Ints, images: Images, path: Path, root: str | None) -> Ints:
    """Return for each training image the row of the file that labels it, (N,) int64; -1 where there is none."""
    assert written.paths is not None
    files = find_originals(images)
    if isinstance(files, FileImages):
        table = PathTable.of(written.paths)
        places = list(dict.fromkeys([files.root, *([] if root is None else [Path(root)]), Path()]))
        if table.are_absolute().all():  # then the folder makes no difference
            del places[1:]
        found = [match_files(FileImages(place, table), files) for place in places]
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
            f"{path} names {written.paths[at]}{written.describe_place(at)}, which is no training image "
            f"({len(unknown)} of {len(rows)} are none): write paths as in {images.name(0)}, or delete these rows."
        )
    about = np.full(len(images), -1, dtype=np.int64)
    about[rows[::-1]] = np.arange(len(rows))[::-1]  # of several rows about an image, the first
    again = np.flatnonzero(numbers[about[rows]] != numbers)
    if len(again):
        second = int(again[0])
        raise UserError(
            f"{path} has two labels for {written.paths[second]}, one{written.describe_place(int(about[rows[second]]))} and one"
            f"{written.describe_place(second)}: delete one of them."
        )
    if isinstance(files, FileImages):  # a training list may name an image several times
        about = about[match_files(files, files)]
    return about


def _select_labels(found: dict[str, NDArray[np.integer]], path: Path, key: str | None, own: Ints) -> NDArray[np.integer]:
    """Return the labels that ``key`` names; refuse the file if its clean labels are not those of the data set."""
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
