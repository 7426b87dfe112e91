"""Names of classes and numbers of classes, in every place where a label is written."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastadvisor.config import Config, resolve
from fastadvisor.datasets import load_source, prepare
from fastadvisor.datasets.class_labels import resolve_labels
from fastadvisor.errors import UserError

TWELVE = sorted(str(number) for number in range(12))
"""Folders 0 to 11 as they are sorted: 0, 1, 10, 11, 2, ..."""


@pytest.mark.parametrize(
    ("labels", "classes", "numbers", "told"),
    [
        (["cat", "ant"], ["ant", "bee", "cat"], [2, 0], None),
        (["2", "0"], ["ant", "bee", "cat"], [2, 0], None),
        (["2", "11", "0"], TWELVE, [4, 3, 0], "names of classes, as all of them are names: '2' is the class '2', and not '10'"),
        (["0", "1"], TWELVE, [0, 1], None),  # both readings are one
        (["02", "11"], TWELVE, [4, 3], "as all of them are names"),
        (["2", "12"], ["02", "12", "30"], [0, 1], "as all of them are names"),
        (["0", "1"], ["1", "2"], [0, 1], "numbers of classes, as not all of them are names: '1' is the class '2', and not '1'"),
        (["1", "2"], ["1", "2"], [0, 1], "as all of them are names: '1' is the class '1', and not '2'"),
        (["2", "02"], ["2", "02", "5"], [0, 1], "as all of them are names"),  # two classes: 002 would be neither
    ],
)
def test_all_names_or_all_numbers(labels, classes, numbers, told):
    found = resolve_labels(labels, classes, "l.csv")
    assert found.numbers.tolist() == numbers
    assert (found.note is None) if told is None else (told in found.note and found.note.startswith("The labels of l.csv"))


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["cat", "wasp"], "l.csv: the label 'wasp' there is neither a class of the data set nor a class number (0 to 2)"),
        (["0", "3"], "l.csv: the label '3' there is neither"),
        (["0", "-1"], "the label '-1' there"),
        (
            ["cat", "1"],
            "some labels are names of classes, as 'cat' there, and some are numbers, as '1' there: write them alike",
        ),
        (["caat"], "Did you mean 'cat'?"),
    ],
)
def test_what_is_neither_is_named(labels, says):
    with pytest.raises(UserError) as error:
        resolve_labels(labels, ["ant", "bee", "cat"], "l.csv", lambda label: " there")
    assert says in str(error.value)


@pytest.fixture
def twelve(tmp_path):
    """Four images a class, in folders that have numbers for names."""
    for part in ("train", "test"):
        for name in TWELVE:
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(4):
                seed = [len(part), int(name), number]
                pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{number}.png")
    return tmp_path


def prepared(root, **settings):
    config = resolve(Config, dataset="imagefolder", data_root=str(root), **settings)
    return prepare(load_source(config), config, 0)


def folder_of(data, row):
    return data.images.name(row).split("/")[-2]


@pytest.mark.parametrize("kind", ["csv", "txt"])
def test_a_trusted_image_keeps_the_class_of_its_folder(twelve, kind):
    rows = [(f"train/{name}/{number}.png", name) for name in TWELVE for number in (0, 2)]
    between, head = (",", ["path,label"]) if kind == "csv" else (" ", [])
    (twelve / f"trusted.{kind}").write_text("\n".join(head + [f"{path}{between}{label}" for path, label in rows]))
    data = prepared(twelve, meta_list=f"trusted.{kind}")
    assert [data.classes[label] for label in data.labels[data.meta_ids].tolist()] == [label for _, label in rows]
    assert all(data.classes[data.labels[row]] == folder_of(data, row) for row in data.meta_ids.tolist())
    assert "are taken as names of classes, as all of them are names: '" in data.notes[0]


@pytest.mark.parametrize("kind", ["npy", "pt", "txt", "csv"])
def test_labels_of_a_file_are_read_alike(twelve, kind):
    given = [name for name in TWELVE for _ in range(4)]
    path = twelve / f"labels.{kind}"
    if kind == "npy":
        np.save(path, np.array(given, dtype=np.int64))
    elif kind == "pt":
        torch.save(torch.tensor([int(name) for name in given]), path)
    else:
        path.write_text("\n".join((["label"] if kind == "csv" else []) + given))
    data = prepared(twelve, meta_per_class=1, labels=str(path))
    assert data.noise_rate() == 0
    assert f"The labels of {path} are taken as names" in data.notes[-1]


def test_numbers_are_numbers_where_they_cannot_be_names(twelve):
    """Classes 1 to 11 and 20: 0 is no name, so all are numbers."""
    for part in ("train", "test"):
        (twelve / part / "0").rename(twelve / part / "20")
    classes = sorted([*TWELVE[1:], "20"])
    given = [str(number) for number in range(12) for _ in range(4)]
    (twelve / "labels.txt").write_text("\n".join(given))
    data = prepared(twelve, meta_per_class=1, labels=str(twelve / "labels.txt"))
    assert data.classes == classes
    assert data.noise_rate() == 0
    assert "are taken as numbers of classes, as not all of them are names: '1' is the class '10', and not '1'" in data.notes[-1]


def test_the_lists_of_a_data_set_are_read_together(twelve):
    """The test list has names and numbers alike; the training list has a label that is a name alone."""
    (twelve / "classes.txt").write_text("\n".join(["3", "2", "1", "20"]))
    (twelve / "train.txt").write_text(
        "\n".join(f"train/{name}/{n}.png {name}" for name in "123" for n in range(4)) + "\ntrain/0/0.png 20"
    )
    (twelve / "test.txt").write_text("\n".join(f"test/{name}/{n}.png {name}" for name in "123" for n in range(2)))
    source = load_source(resolve(Config, dataset="list", data_root=str(twelve)))
    assert [source.classes[label] for label in source.test.labels.tolist()] == list("112233")
    assert source.train.labels[-1] == 3
    assert "are taken as names" in source.notes[0]


def test_two_classes_of_one_name(twelve):
    (twelve / "classes.txt").write_text("ant\n\nbee\nant\n")
    (twelve / "train.txt").write_text("train/0/0.png 0\n")
    (twelve / "test.txt").write_text("test/0/0.png 0\n")
    with pytest.raises(UserError, match=r"classes.txt calls two classes 'ant', in line 1 and line 4: rename one of them"):
        load_source(resolve(Config, dataset="list", data_root=str(twelve)))


# Labels by path


def labels_csv(root, rows, header="path,label"):
    path = root / "labels.csv"
    path.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n")
    return str(path)


def as_given(data):
    return {data.images.name(row): data.classes[data.labels[row]] for row in range(len(data.images))}


@pytest.mark.parametrize("prefix", ["train/", "", "/"], ids=["root", "train", "absolute"])
def test_labels_go_to_the_images_that_their_paths_name(twelve, prefix):
    """In an order of the file's own."""
    start = f"{twelve}/train/" if prefix == "/" else prefix
    wanted = {f"{name}/{number}.png": TWELVE[(at + number) % 12] for at, name in enumerate(TWELVE) for number in range(4)}
    rows = list(wanted.items())
    np.random.default_rng(0).shuffle(rows)
    path = labels_csv(twelve, [(start + file, label) for file, label in rows])
    found = as_given(prepared(twelve, meta_per_class=1, labels=path, seed=3))
    kept = prepared(twelve, meta_per_class=1, seed=3).meta_ids.tolist()  # drawn before labels are looked at
    names = [f"{twelve}/train/{name}/{number}.png" for name in TWELVE for number in range(4)]
    for row, name in enumerate(names):
        file = name.removeprefix(f"{twelve}/train/")
        assert found[name] == (file.split("/")[0] if row in kept else wanted[file])


@pytest.mark.parametrize("loader", ["resident", "torch"])
def test_the_rows_given_are_enough(twelve, loader):
    from fastadvisor.loading import cache_images

    path = labels_csv(twelve, [("train/3/1.png", "7"), ("train/11/0.png", "0")])
    settings = {"meta_per_class": 1, "labels": path, "loader": loader, "image_size": 6, "crop_padding": 0}
    config = resolve(Config, dataset="imagefolder", data_root=str(twelve), **settings)
    source = cache_images(load_source(config), config, torch.device("cpu"))
    data = prepare(source, config, 0)
    changed = {name: given for name, given in as_given(data).items() if name.split("/")[-2] != given}
    held_out = {data.images.name(row) for row in data.meta_ids.tolist()}
    expected = {f"{twelve}/train/3/1.png": "7", f"{twelve}/train/11/0.png": "0"}
    assert changed == {name: given for name, given in expected.items() if name not in held_out}
    assert "labels 2 of 48 training images; the others keep the data set's own labels" in data.notes[-1]


def test_cleanlabs_columns(twelve):
    files = [(f"train/{name}/{number}.png", name) for name in TWELVE for number in range(4)]
    rows = [(path, "True", "0.1", given, TWELVE[(TWELVE.index(given) + 1) % 12]) for path, given in files[::-1]]
    path = labels_csv(twelve, rows, "path,is_label_issue,label_score,given_label,predicted_label")
    assert prepared(twelve, meta_per_class=1, labels=path, labels_key="given_label").noise_rate() == 0
    assert prepared(twelve, meta_per_class=1, labels=path, labels_key="predicted_label").noise_rate() == 1
    with pytest.raises(UserError, match="holds several labels: name one with --labels-key, of given_label, predicted_label"):
        prepared(twelve, meta_per_class=1, labels=path)
    only = labels_csv(twelve, [(path, given) for path, given in files], "image_path,given_label")
    assert prepared(twelve, meta_per_class=1, labels=only).noise_rate() == 0


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            [("train/3/1.png", "7"), ("train/3/9.png", "7")],
            r"names train/3/9.png in row 3, which is no training image \(1 of 2",
        ),
        ([("test/3/1.png", "7")], "names test/3/1.png in row 2, which is no training image"),
        (
            [("train/3/1.png", "7"), ("3/1.png", "7")],
            r"which is no training image \(1 of 2 are none\): write paths as in .*train/0/0",
        ),
        ([("train/3/1.png", "7"), ("train/3/./1.png", "8")], "has two labels for .* in row 3: delete one"),
        ([("train/3/1.png", "")], "row 2: it has no label"),
        ([("train/3/1.png", "wasp")], "the label 'wasp' in row 2 is neither"),
    ],
)
def test_rows_that_are_about_nothing(twelve, rows, says):
    with pytest.raises(UserError, match=says):
        prepared(twelve, meta_per_class=1, labels=labels_csv(twelve, rows))


def test_paths_where_images_have_none(tmp_path):
    path = labels_csv(tmp_path, [("0.png", "7")])
    config = resolve(Config, labels=path)
    with pytest.raises(UserError, match="has a column of paths, and the data set's images have none: give it a column id"):
        prepare(load_source(config), config, 0)
