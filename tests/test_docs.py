"""Pages under docs/ and the rooms' READMEs name files, functions and rooms that exist."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

from tests.test_rooms import FLOORS, below

ROOT = Path(__file__).parents[1]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PAGES = sorted(
    {ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("fastadvisor/*/README.md")}
)
ROOMS = [name for floor in FLOORS for name in floor if (ROOT / "fastadvisor" / name / "__init__.py").is_file()]


def quoted(text: str) -> list[str]:
    """Return what stands in backticks, outside of blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def resolve(name: str) -> object:
    """Return what the dotted ``name`` is, in fastadvisor."""
    parts = name.removeprefix("fastadvisor.").split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(["fastadvisor", *parts[:count]]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


DOTTED = [word for word in quoted(ARCHITECTURE) if re.fullmatch(r"[a-z_]\w*(\.\w+)+", word) and not word.endswith(".py")]
PATHS = [word for word in quoted(ARCHITECTURE) if re.fullmatch(r"[\w/]+(/|\.py)", word)]


@pytest.mark.parametrize("name", sorted(set(DOTTED)))
def test_every_dotted_name_of_the_architecture_exists(name):
    resolve(name)


@pytest.mark.parametrize("path", sorted(set(PATHS)))
def test_every_file_of_the_architecture_exists(path):
    assert (ROOT / path).exists() or (ROOT / "fastadvisor" / path).exists()


def test_a_linked_name_is_defined_in_the_file_that_the_link_shows():
    links = re.findall(r"\[`([\w.]+)`\]\(([^)]+)\)", ARCHITECTURE)
    assert len(links) > 20
    for name, target in links:
        assert inspect.getsourcefile(resolve(name)) == str((ROOT / "docs" / target).resolve()), name


def test_a_batch_has_at_most_ten_stops():
    assert 5 < len(re.findall(r"^\d+\. ", ARCHITECTURE, flags=re.MULTILINE)) <= 10


def test_the_table_of_rooms_names_all_from_the_top_down():
    named = re.findall(r"^\| \[(\w+)\]\(\.\./", ARCHITECTURE, flags=re.MULTILINE)
    assert named == [*ROOMS, "kernels"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("room", ROOMS)
def test_the_readme_of_a_room_says_what_it_may_import(room):
    text = (ROOT / "fastadvisor" / room / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^May import: (.+?)\.(?: |$)", text, flags=re.MULTILINE)
    allowed = [name for name in below(room) if name in (*ROOMS, "kernels", "ground")]
    assert line.split(", ") == allowed


@pytest.mark.parametrize("room", ROOMS)
def test_the_readme_of_a_room_names_files_that_exist(room):
    folder = ROOT / "fastadvisor" / room
    for word in quoted((folder / "README.md").read_text(encoding="utf-8")):
        if re.fullmatch(r"[\w/]+\.py", word):
            assert any(base.joinpath(word).is_file() for base in (folder, folder.parent, ROOT)) or any(folder.rglob(word)), word


@pytest.mark.parametrize("room", ROOMS)
def test_the_readme_of_a_room_names_its_files(room):
    folder = ROOT / "fastadvisor" / room
    named = quoted((folder / "README.md").read_text(encoding="utf-8"))
    missing = [path.name for path in folder.glob("*.py") if path.name not in (*named, "__init__.py")]
    assert not missing
