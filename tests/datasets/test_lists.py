"""Lists of paths and labels, as people and their programs write them."""

import numpy as np
import pytest

from fastadvisor.datasets.paths import PathTable
from fastadvisor.datasets.readers.lists import count_classes, read_csv, read_keys, read_list, read_names
from fastadvisor.errors import UserError

PATHS = ["train/a/1.jpg", "train/b/two words.jpg", "train/é/ß 3.JPEG", "x.jpg"]
LABELS = [0, 12, 999, 3]


def write(folder, content):
    path = folder / "list.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def listed(path):
    paths, labels = read_list(path)
    return [paths[row] for row in range(len(paths))], labels.tolist()


@pytest.mark.parametrize(
    "form",
    [
        "{path} {label}\n",
        "{path} {label}\r\n",
        "{path}\t{label}\n",
        "{path}   {label}  \n",
        "  {path} {label}\n\n\n",
        "{path} {label:04}\n",
    ],
)
@pytest.mark.parametrize("start", ["", "\ufeff", "\n\r\n"])
@pytest.mark.parametrize("last_line_ends", [True, False])
def test_a_list_is_read_however_it_is_written(tmp_path, form, start, last_line_ends):
    text = start + "".join(form.format(path=path, label=label) for path, label in zip(PATHS, LABELS, strict=True))
    assert listed(write(tmp_path, text if last_line_ends else text.rstrip())) == (PATHS, LABELS)


def test_names_in_another_encoding_are_the_file_systems(tmp_path):
    name = "caf\xe9.jpg".encode("latin-1")
    (tmp_path / "images").mkdir()
    found = read_list(write(tmp_path, name + b" 1\n")).paths[0]
    (tmp_path / "images" / found).write_bytes(b"x")
    assert [path.name.encode("utf-8", "surrogateescape") for path in (tmp_path / "images").iterdir()] == [name]


def test_windows_separators_are_turned_unless_the_list_has_others(tmp_path):
    assert listed(write(tmp_path, "a\\b\\1.jpg 0\na\\2.jpg 1\n")) == (["a/b/1.jpg", "a/2.jpg"], [0, 1])
    assert listed(write(tmp_path, "a/b\\1.jpg 0\n")) == (["a/b\\1.jpg"], [0])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a.jpg 0\nb.jpg\n", "line 2: 'b.jpg' is not a path, a blank and a class number"),
        ("a.jpg 0\n\nb.jpg one\n", "line 3: 'b.jpg one' is not"),
        ("a.jpg 0\n7\n", "line 2: '7' is not"),
        ("a.jpg -1\n", "line 1: 'a.jpg -1' is not"),
        ("a.jpg 1.5\n", "line 1: 'a.jpg 1.5' is not"),
        ("a.jpg,1\n", "line 1: 'a.jpg,1' is not"),
        ("a.jpg 12345678901\n", "line 1: 'a.jpg 12345678901' is not"),
        ("", "is empty"),
        ("\n \r\n", "is empty"),
        (b"a.jpg\x00 1", "is not a text file"),
    ],
)
def test_a_list_that_is_none_names_the_line(tmp_path, content, sentence):
    with pytest.raises(UserError, match=r"list\.txt") as error:
        read_list(write(tmp_path, content))
    assert sentence in str(error.value)


def test_a_list_that_is_missing(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_list(tmp_path / "list.txt")
    with pytest.raises(UserError, match="cannot be read"):
        read_list(tmp_path)


def test_keys_have_no_label(tmp_path):
    keys = read_keys(write(tmp_path, "images/0/1.jpg\r\n0/two words.jpg\r\n"))
    assert [keys[row] for row in range(2)] == ["images/0/1.jpg", "0/two words.jpg"]
    short = keys.remove_prefix("images/")
    assert [short[row] for row in range(2)] == ["0/1.jpg", "0/two words.jpg"]


def test_a_long_list(tmp_path):
    """200,000 lines; labels and paths of random length against Python's own parsing."""
    rng = np.random.default_rng(0)
    lines = [f"{'d' * n}/{i}.jpg {label}" for i, (n, label) in enumerate(rng.integers(1, 30, size=(200_000, 2)).tolist())]
    paths, labels = read_list(write(tmp_path, "\n".join(lines)))
    some = rng.integers(len(lines), size=2000).tolist()
    for row in [0, *some, len(lines) - 1]:
        path, _, label = lines[row].rpartition(" ")
        assert (paths[row], int(labels[row])) == (path, int(label))
    order = rng.permutation(len(lines))
    assert np.array_equal(paths.find(paths.select(order)), order)
    assert paths.find(PathTable.of(["nowhere.jpg", lines[5].rpartition(" ")[0]])).tolist() == [-1, 5]


def test_tables_are_put_one_after_another():
    table = PathTable.concatenate([PathTable.of(["a", "bc"]).select(np.array([1])), PathTable.of(["d", "", "é"])])
    assert [table[row] for row in range(len(table))] == ["bc", "d", "", "é"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_a_csv_is_read_however_it_is_written(tmp_path, end, start):
    rows = ["Label , id, PATH,split", 'cat,0,"a, b.jpg",Train', "dog,1,é/1.jpg,validation", "", 'cat,2,"say ""x"".jpg",train']
    table = read_csv(write(tmp_path, start + end.join(rows)))
    assert [table.paths[row] for row in range(3)] == ["a, b.jpg", "é/1.jpg", 'say "x".jpg']
    assert [table.names[label] for label in table.labels] == ["cat", "dog", "cat"]
    assert [table.parts[split] for split in table.splits] == ["train", "val", "train"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "has no column 'path'"),
        ("a.jpg,1\n", "has no column 'path'"),
        ("path,class\na.jpg,1\n", "has no column 'label'"),
        ("path,label\n", "is empty"),
        ("path,label\na.jpg,1\nb.jpg\n", "row 3: it lacks a path or a label"),
        ("path,label\na.jpg, \n", "row 2: it lacks a path or a label"),
        ("path,label,split\na.jpg,1,dev\n", "row 2: the split 'dev' is not one of train, meta, val and test"),
        ("path,label\na.jpg\0,1\n" + "x" * 200_000, "cannot be read as CSV"),
        ("path,label\na.jpg\0,1\n", "is not a text file"),
    ],
)
def test_a_csv_that_is_none_names_the_row(tmp_path, content, sentence):
    with pytest.raises(UserError, match=r"list\.txt") as error:
        read_csv(write(tmp_path, content))
    assert sentence in str(error.value)


def test_a_label_too_high_for_the_images_is_no_class_number():
    parts = [np.array([0, 1]), np.array([3])]
    assert count_classes(parts[:1]) == 2
    assert count_classes(parts, ["a", "b"]) == 2
    with pytest.raises(UserError, match="highest class number is 3, and there are 3 images: number the classes from 0 on"):
        count_classes(parts)


def test_names_are_lines(tmp_path):
    assert read_names(write(tmp_path, "\ufeffT-Shirt\r\n Down Coat \r\n\r\n")) == ["T-Shirt", "Down Coat"]
    with pytest.raises(UserError, match="cannot be read as text"):
        read_names(write(tmp_path, b"\xff\xfe"))
