"""Imports run down the floors of the house only, and never in a circle: every import of both packages is read and checked.

Imports inside functions and under ``TYPE_CHECKING`` count: a file that names another's type has to change with it.
"""

import ast
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (Path("fastadvisor"), Path("kernels/fastadvisor_kernels"))

FLOORS = (
    ("cli",),
    ("commands",),
    ("training",),
    ("iterations",),
    ("metagrad", "pretraining"),
    ("loading",),
    ("datasets", "models", "report"),
    ("methods", "runtime"),
    ("config", "losses", "kernels"),
    ("ground",),
)
"""The rooms from the top floor down. A file may import files of its own room and of every lower floor; rooms on one floor do
not know each other. A folder ``fastadvisor/<room>/`` is a room.
"""

PLACES = {
    "fastadvisor/__init__.py": "cli",  # the front door: names what the upper rooms offer, and imports it on first use
    "fastadvisor/__main__.py": "cli",
    "fastadvisor/recipes/__init__.py": "config",  # the defaults of the data sets, as YAML
    "fastadvisor/errors.py": "ground",
    "fastadvisor/version.py": "ground",
    "fastadvisor/loading/batch.py": "ground",  # three tensors by name, made in loading and passed around in every room
}
"""Files whose room is not the folder that they lie in."""


class Arrow(NamedTuple):
    """One import."""

    file: str
    line: int
    to: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.to}"


def files(root: Path) -> dict[str, str]:
    """Return the module name of every Python file, by its path from ``root``."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to((root / package).parent).with_suffix("").parts
            found[path.relative_to(root).as_posix()] = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return found


def arrows(root: Path) -> Iterator[Arrow]:
    """Return every import of one file of the two packages by another, wherever in the file it stands."""
    names = files(root)
    paths = {module: path for path, module in names.items()}
    for path, module in names.items():
        package = module if path.endswith("__init__.py") else module.rpartition(".")[0]
        for node in ast.walk(ast.parse((root / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                around = package.split(".")[: 1 - node.level or None] if node.level else []  # "." is the package itself
                base = ".".join([*around, *([node.module] if node.module else [])])
                inner = [f"{base}.{alias.name}" for alias in node.names]
                wanted = [name if name in paths else base for name in inner]  # a module of that name, or a name in the package
            else:
                continue
            for name in dict.fromkeys(wanted):
                if name in paths and paths[name] != path:
                    yield Arrow(path, node.lineno, paths[name])


def room(path: str, places: Mapping[str, str]) -> str:
    """Return the room of a file."""
    if path in places:
        return places[path]
    parts = path.split("/")
    if parts[0] == "kernels":
        return "kernels"
    assert len(parts) > 2, (
        f"{path} lies in no room: move it into one of {', '.join(name for floor in FLOORS for name in floor)}."
    )
    assert any(parts[1] in floor for floor in FLOORS), (
        f"{path} lies in {parts[1]}/, which is no room of the house: move it, or name the room in FLOORS."
    )
    return parts[1]


def below(name: str) -> list[str]:
    """Return the rooms that the room ``name`` may import."""
    if name == "kernels":  # are published on their own: they import nothing of fastadvisor
        return []
    floor = next(number for number, names in enumerate(FLOORS) if name in names)
    return [lower for names in FLOORS[floor + 1 :] for lower in names]


def wrong_way(found: Collection[Arrow], places: Mapping[str, str]) -> dict[Arrow, str]:
    """Return the arrows that do not run down, each with a sentence that says so."""
    wrong = {}
    for arrow in found:
        here, there = room(arrow.file, places), room(arrow.to, places)
        if here != there and there not in below(here):
            allowed = ", ".join(below(here)) or "nothing of fastadvisor"
            wrong[arrow] = f"{arrow}: {here} -> {there} does not run down; {here} may import itself and {allowed}."
    return wrong


def circles(found: Collection[Arrow]) -> list[list[Arrow]]:
    """Return circles of imports between files: none if there are none, else one for every import that closes a circle."""
    following: dict[str, list[Arrow]] = {}
    for arrow in found:
        following.setdefault(arrow.file, []).append(arrow)
    done: set[str] = set()
    found_circles = []

    def visit(file: str, way: list[Arrow]) -> None:
        for arrow in following.get(file, []):
            on_the_way = [step.file for step in way] + [file]
            if arrow.to in on_the_way:
                found_circles.append([*way[on_the_way.index(arrow.to) :], arrow])
            elif arrow.to not in done:
                visit(arrow.to, [*way, arrow])
        done.add(file)

    for file in list(following):
        if file not in done:
            visit(file, [])
    return found_circles


ARROWS = list(arrows(ROOT))


def test_imports_run_down_only():
    wrong = wrong_way(ARROWS, PLACES)
    assert not wrong, "\n" + "\n".join(wrong.values())


def test_no_imports_in_a_circle():
    found = circles(ARROWS)
    assert not found, "\n" + "\n".join("A circle: " + ", ".join(map(str, circle)) + "." for circle in found)


def test_every_file_is_in_a_room():
    for path in files(ROOT):
        room(path, PLACES)
    gone = [path for path in PLACES if not (ROOT / path).is_file()]
    assert not gone, f"These files are gone, delete their lines in PLACES: {', '.join(gone)}."


# ---- the test itself ----


def house(root: Path, contents: dict[str, str]) -> Path:
    """Write files: ``{"training/trainer": "import torch"}`` is fastadvisor/training/trainer.py."""
    for name, text in contents.items():
        path = root / "fastadvisor" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    "text",
    [
        "from fastadvisor.training.trainer import Trainer",
        "from fastadvisor.training import trainer",
        "import os, fastadvisor.training.trainer",
        "def late():\n    from fastadvisor.training.trainer import Trainer",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fastadvisor.training.trainer import Trainer",
        "from ..training.trainer import Trainer",
        "from ..training import trainer",
    ],
)
def test_an_import_that_runs_up_is_named(tmp_path, text):
    line = len(text.splitlines())
    found = list(arrows(house(tmp_path, {"methods/focal": text, "training/trainer": "from fastadvisor.methods import focal"})))
    (why,) = wrong_way(found, {}).values()
    assert why == (
        f"fastadvisor/methods/focal.py:{line} imports fastadvisor/training/trainer.py: methods -> training does not run down; "
        "methods may import itself and config, losses, kernels, ground."
    )


def test_rooms_on_one_floor_do_not_know_each_other(tmp_path):
    root = house(tmp_path, {"models/build": "from fastadvisor.datasets.types import Split", "datasets/types": ""})
    assert len(wrong_way(list(arrows(root)), {})) == 1


def test_imports_that_run_down_or_stay_in_the_room_are_none_of_its_business(tmp_path):
    root = house(
        tmp_path,
        {
            "training/trainer": "from fastadvisor.loading import Batch\nfrom fastadvisor.training import schedule",
            "training/schedule": "from fastadvisor.errors import UserError",
            "loading/__init__": "from fastadvisor.loading.batch import Batch",
            "loading/batch": "",
            "errors": "",
        },
    )
    found = list(arrows(root))
    assert len(found) == 4
    assert not wrong_way(found, PLACES)
    assert not circles(found)


def test_kernels_know_nothing_of_fastadvisor(tmp_path):
    root = house(tmp_path, {"errors": ""})
    kernels = root / "kernels/fastadvisor_kernels"
    kernels.mkdir(parents=True)
    (kernels / "launch.py").write_text("from fastadvisor.errors import UserError")
    (kernels / "dispatch.py").write_text("from fastadvisor_kernels.launch import run")
    assert [arrow.to for arrow in wrong_way(list(arrows(root)), PLACES)] == ["fastadvisor/errors.py"]


def test_a_circle_is_named(tmp_path):
    root = house(
        tmp_path,
        {
            "loading/a": "def late():\n    from fastadvisor.loading.b import x",
            "loading/b": "from fastadvisor.loading import c",
            "loading/c": "from fastadvisor.loading import a\nfrom fastadvisor.loading import d",
            "loading/d": "",
            "loading/e": "from fastadvisor.loading import a",
        },
    )
    (circle,) = circles(list(arrows(root)))
    assert {(arrow.file[-4:], arrow.line, arrow.to[-4:]) for arrow in circle} == {
        ("a.py", 2, "b.py"),
        ("b.py", 1, "c.py"),
        ("c.py", 1, "a.py"),
    }


def test_a_file_in_no_room_is_refused():
    with pytest.raises(AssertionError, match="lies in no room"):
        room("fastadvisor/extra.py", {})
    with pytest.raises(AssertionError, match="no room of the house"):
        room("fastadvisor/utils/extra.py", {})
