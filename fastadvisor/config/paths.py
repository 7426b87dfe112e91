"""Settings that name files and folders, and how to make them valid from any working folder."""

import os
from collections.abc import Mapping
from typing import Any

LISTS = ("train_list", "test_list", "meta_list")
PATHS = ("data_root", *LISTS, "labels", "weights", "cache_dir", "output")
"""Settings that name a file or folder: any of them may be a ``pathlib.Path``, or begin with ``~``."""


def expand_user(path: str | os.PathLike[str]) -> str:
    """Return ``path`` as a string, with ``~`` written out."""
    return os.path.expanduser(os.fspath(path))


def make_absolute(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with absolute paths, which hold from any folder. A list may be named from the data set's root, too."""
    whole = dict(values)
    for key in PATHS:
        path = values.get(key)
        if not isinstance(path, str):
            continue
        inside = os.path.join(expand_user(values.get("data_root") or "."), path)
        whole[key] = os.path.abspath(inside if key in LISTS and not os.path.isfile(path) and os.path.isfile(inside) else path)
    return whole


def move_lists(values: Mapping[str, Any], data_root: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Return settings for a data set that lies in ``data_root`` now: lists that lay inside its old root, and are there, too."""
    old, whole = values.get("data_root"), dict(values)
    if not isinstance(old, str) or data_root is None:
        return whole
    for key in (*LISTS, "labels"):
        path = values.get(key)
        if isinstance(path, str) and path.startswith(f"{old.rstrip(os.sep)}{os.sep}"):
            there = os.path.join(os.path.abspath(expand_user(data_root)), os.path.relpath(path, old))
            whole[key] = there if os.path.isfile(there) else path
    return whole
