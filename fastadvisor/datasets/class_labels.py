"""Labels as text, by the name of a class or by its number. A fixed rule decides which it is."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fastadvisor.datasets.paths import Ints
from fastadvisor.errors import UserError, suggest


class ClassNumbers(NamedTuple):
    """The classes that some labels stand for."""

    numbers: Ints
    """(L,) int64: the class number of each label."""
    note: str | None
    """What to tell the user if a label could be read either way; None if none could."""


def resolve_labels(
    labels: Sequence[str], classes: Sequence[str], where: object, place: Callable[[str], str] = lambda label: ""
) -> ClassNumbers:
    """Return the class number of each label.

    If all labels are names of classes, they are taken as names. Otherwise, if all are class numbers (0 to C - 1), they are
    taken as numbers. The two readings differ where the names of classes are numbers themselves: folders ``0`` to ``11`` sort as
    0, 1, 10, 11, 2, ..., so ``2`` is the name of class number 4.

    Args:
        labels: L labels as they are written; usually the distinct labels of a file.
        classes: C names, in the order of the class numbers.
        where: the file or files that the labels are from, for messages.
        place: returns where in that file a label stands, in words, for messages.

    Raises:
        UserError: a label is neither a name nor a class number, or some labels are only names and others only numbers.
    """
    names = {name: number for number, name in enumerate(classes)}
    values = {int(name): number for name, number in names.items() if _is_number(name)}
    if len(values) < len(names):  # 2 means the class 02 too, but only if all names are numbers and no two are equal
        values = {}
    by_name = [names.get(label, values.get(int(label), -1) if _is_number(label) else -1) for label in labels]
    by_number = [int(label) if _is_number(label) and int(label) < len(classes) else -1 for label in labels]
    named, numbered = -1 not in by_name, -1 not in by_number
    if not (named or numbered):
        raise UserError(_neither(labels, by_name, by_number, classes, where, place))
    note = None
    different = [
        triple for triple in zip(labels, by_name, by_number, strict=True) if -1 not in triple and triple[1] != triple[2]
    ]
    if different:
        label, one, two = different[0]
        kind, meant, other = ("names", one, two) if named else ("numbers", two, one)
        why = "as all of them are names" if named else "as not all of them are names"
        note = (
            f"The labels of {where} are taken as {kind} of classes, {why}: {label!r} is the class {classes[meant]!r}, and not "
            f"{classes[other]!r}."
        )
    return ClassNumbers(np.array(by_name if named else by_number, dtype=np.int64), note)


def _neither(
    labels: Sequence[str],
    by_name: Sequence[int],
    by_number: Sequence[int],
    classes: Sequence[str],
    where: object,
    place: Callable[[str], str],
) -> str:
    unknown = next((label for label, one, two in zip(labels, by_name, by_number, strict=True) if one < 0 and two < 0), None)
    if unknown is not None:
        return (
            f"{where}: the label {unknown!r}{place(unknown)} is neither a class of the data set nor a class number "
            f"(0 to {len(classes) - 1}): correct it.{suggest(unknown, classes)}"
        )
    name = next(label for label, number in zip(labels, by_number, strict=True) if number < 0)
    number = next(label for label, one in zip(labels, by_name, strict=True) if one < 0)
    return (
        f"{where}: some labels are names of classes, as {name!r}{place(name)}, and some are numbers, as "
        f"{number!r}{place(number)}: write them alike."
    )


def _is_number(label: str) -> bool:
    return label.isascii() and label.isdigit() and len(label) < 10
