"""Find the files of a data set: its root, its lists, and the folder that the paths in a list are relative to."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from fastadvisor.config import DataConfig
from fastadvisor.datasets.images import FileImages
from fastadvisor.datasets.paths import PathTable
from fastadvisor.errors import UserError

PROBED = 5
"""Number of files, spread over a list, that are looked for to find the folder that its paths are relative to."""

FOLDERS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "val": ("val", "valid", "validation"),
    "meta": ("meta",),
}
"""The names that the folder of each part may have."""


def find_root(config: DataConfig, holds: str) -> Path:
    """Return ``config.data_root``.

    Raises:
        UserError: it is not given or is not a folder; the message says that it should hold ``holds``.
    """
    if config.data_root is None:
        raise UserError(f"{config.dataset} needs --data-root DIR, the folder that holds {holds}.")
    root = Path(config.data_root)
    if not root.is_dir():
        raise UserError(f"There is no folder {root}: --data-root must hold {holds}.")
    return root


def find_file(root: Path, *names: str) -> Path:
    """Return the path of the first of ``names`` that is a file in ``root`` or in a folder directly below it.

    Raises:
        UserError: none of them is.
    """
    folders = [root, *_list_folders(root)]
    for name in names:
        for folder in folders:
            if (folder / name).is_file():
                return folder / name
    raise UserError(f"There is no {' or '.join(names)} in {root} or a folder right beneath it: check --data-root.")


def find_images(
    root: Path,
    paths: PathTable,
    part: str,
    listed: object,
    folders: Sequence[Path | str] = (),
    *,
    last: Sequence[Path] = (),
    anywhere: bool = False,
) -> FileImages:
    """Return the images of ``paths``, which are relative to ``root`` or to the folder of their own part in it.

    Up to five of the files are looked for; none is opened. The folders of other parts are never searched, as each of them may
    hold images of the same names.

    Args:
        root: the folder of the data set.
        paths: N relative paths.
        part: train, meta, test or val.
        listed: the list that the paths are from, for messages.
        folders: further folders that the layout of the data set has for this part, in ``root`` or elsewhere.
        last: folders to search if the images are in none of the others.
        anywhere: whether the images may also be in any other folder directly below ``root``.

    Raises:
        UserError: none of the files that are looked for exists, or they exist in two folders.
    """
    own = [name for name in FOLDERS[part] if (root / name).is_dir()]
    if part == "test" and not own:  # a data set without test/ is tested on val/
        own = [name for name in FOLDERS["val"] if (root / name).is_dir()]
    tried = [root, *(root / name for name in own), *(root / name for name in folders if (root / name).is_dir())]
    others = {name for names in FOLDERS.values() for name in names}
    if anywhere:
        tried += [folder for folder in _list_folders(root) if folder.name.lower() not in others]
    some = [paths[row] for row in np.linspace(0, len(paths) - 1, PROBED, dtype=np.int64).tolist()]
    found = _find_holding(some, tried)
    if not found:
        tried += last
        found = _find_holding(some, last)
    if not found:
        places = " nor in ".join(str(folder) for folder in dict.fromkeys(tried))
        raise UserError(
            f"The image {some[0]} of {listed} is {'neither' if len(tried) > 1 else 'not'} in {places}: "
            f"write the paths relative to {root}, or name the folder that they are relative to with --data-root."
        )
    if len(found) > 1:
        raise UserError(
            f"The images of {listed} are in {found[0]} and in {found[1]}, and which are meant is not to be guessed: "
            f"write their paths relative to {root}, as in {os.path.relpath(found[1] / some[0], root)}."
        )
    return FileImages(found[0], paths)


def _find_holding(paths: Sequence[str], folders: Iterable[Path]) -> list[Path]:
    """Return the folders that hold any of ``paths``; of several folders that lead to the same file, only the first."""
    found: list[Path] = []
    for folder in dict.fromkeys(folders):
        there = next((path for path in paths if os.path.exists(os.path.join(folder, path))), None)
        if there is not None and not any(_is_same_file(one / there, folder / there) for one in found):
            found.append(folder)
    return found


def _is_same_file(one: Path, other: Path) -> bool:
    return os.path.exists(one) and os.path.samefile(one, other)


def _list_folders(root: Path) -> list[Path]:
    try:
        return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"The folder {root} cannot be read ({error.strerror}): check --data-root.") from None
