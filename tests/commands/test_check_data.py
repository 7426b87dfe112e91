"""``fastadvisor data check`` on folders with one of each fault."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from fastadvisor import cli
from fastadvisor.commands import check_data as command
from fastadvisor.commands.check_data import check_data
from fastadvisor.config import CheckConfig, resolve
from fastadvisor.datasets import load_source
from tests.photos import encoded, photo, write_photos


@pytest.fixture
def root(tmp_path):
    return write_photos(tmp_path / "photos", splits=("train", "test", "meta"))


def report_of(root, **settings):
    config = resolve(CheckConfig, dataset="imagefolder", data_root=str(root), **settings)
    return check_data(load_source(config), config)


def test_a_clean_data_set_has_no_problems(root):
    report = report_of(root)
    assert report.problems == report.notes == []
    assert set(report.parts) == {"training", "meta", "test"}
    for part in report.parts.values():
        assert part.images == 16
        assert part.per_class == {"ant": 8, "bee": 8}
        assert (part.imbalance_factor, part.missing, part.broken, part.duplicates, part.unusual) == (1, 0, 0, 0, {})
        assert part.shorter_side == (45, 45, 45)
    assert report.shared == {"meta in training": 0, "meta in test": 0, "training in test": 0}
    assert report.protocol["training"] == report.protocol["meta"] == 16
    assert report.protocol["many_medium_few_shot_classes"] == [0, 0, 2]


def test_the_long_tail_and_the_noise_of_a_run_are_told(root):
    report = report_of(root, imbalance_factor=2, noise="flip", noise_rate=1.0)
    assert report.protocol["imbalance_factor"] == 2
    assert report.protocol["noise_rate"] == 1
    shutil.rmtree(root / "meta")
    assert report_of(root, meta_per_class=3).protocol["meta"] == 6
    assert "leaves none to train on" in report_of(root, meta_per_class=8).problems[0]


def test_unequal_and_empty_classes(root):
    for number in range(6):
        (root / f"train/ant/{number}.jpg").unlink()
    config = resolve(CheckConfig, dataset="imagefolder", data_root=str(root))
    source = load_source(config)
    source.test.labels[:] = 0
    report = check_data(source, config)
    assert report.parts["training"].imbalance_factor == 4
    assert report.parts["test"].imbalance_factor is None
    assert report.notes == ["1 of 2 classes have no test images (first: bee)."]


def test_missing_and_broken_files_are_told_apart(root):
    (root / "train/ant/1.jpg").write_bytes(b"")
    (root / "train/ant/2.jpg").write_bytes((root / "train/ant/3.jpg").read_bytes()[:1500])
    (root / "train/bee/3.jpg").write_bytes(b"a page that says the image has moved")
    config = resolve(CheckConfig, dataset="imagefolder", data_root=str(root))
    source = load_source(config)
    (root / "test/ant/4.jpg").unlink()
    report = check_data(source, config)
    assert (report.parts["training"].missing, report.parts["training"].broken) == (1, 2)
    assert (report.parts["test"].missing, report.parts["test"].broken) == (1, 0)
    assert report.bad[0].reasons == {1: "empty file", 2: "cut short", 11: "not an image"}
    assert "3 of 16 training files" in report.problems[0]
    assert not report_of(root, max_bad_fraction=0.2).problems
    assert report_of(root, decode=False).parts["training"].broken == 0


def test_unusual_files_are_counted_and_are_no_problem(root):
    folder = root / "train/ant"
    (folder / "0.jpg").write_bytes(encoded(photo(50, 40), "PNG"))
    (folder / "1.jpg").write_bytes(encoded(photo(50, 40).convert("CMYK")))
    (folder / "2.jpg").write_bytes(encoded(photo(50, 40).convert("L")))
    turned = Image.Exif()
    turned[0x0112] = 6
    (folder / "3.jpg").write_bytes(encoded(photo(50, 30), exif=turned))
    deep = Image.fromarray((np.arange(2000, dtype=np.uint16) * 30).reshape(40, 50))
    (folder / "4.jpg").write_bytes(encoded(deep, "PNG"))
    report = report_of(root)
    assert report.parts["training"].unusual == {
        "PNG named .jpg": 2,
        "CMYK": 1,
        "grayscale": 1,
        "turned by EXIF": 1,
        "16-bit": 1,
    }
    assert report.parts["training"].shorter_side[0] == 30
    assert not report.problems


def test_duplicates_within_and_across_the_parts(root, tmp_path):
    shutil.copy(root / "train/ant/0.jpg", root / "train/ant/again, with a comma.jpg")
    shutil.copy(root / "train/ant/1.jpg", root / "train/bee/other label é.jpg")
    shutil.copy(root / "train/bee/2.jpg", root / "test/bee/2 of training.jpg")
    shutil.copy(root / "meta/bee/3.jpg", root / "test/bee/3 of meta.jpg")
    report = report_of(root)
    assert report.parts["training"].duplicates == 2
    assert report.conflicts == 2
    assert report.shared == {"meta in training": 0, "meta in test": 1, "training in test": 1}
    assert len(report.notes) == 3
    assert not report.problems
    report.write(tmp_path / "report")
    with open(tmp_path / "report/duplicates.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    groups = {row["group"]: sorted(other["part"] for other in rows if other["group"] == row["group"]) for row in rows}
    assert sorted(groups.values()) == [["meta", "test"], ["test", "training"], ["training"] * 2, ["training"] * 2]
    assert any(row["image"].endswith("other label é.jpg") and row["label"] == "1" for row in rows)


def test_meta_images_among_the_training_images_are_a_problem_told_once(root):
    shutil.copy(root / "meta/bee/3.jpg", root / "train/bee/3 of meta.jpg")
    report = report_of(root)
    assert report.shared["meta in training"] == 1
    assert len(report.problems) == 1
    assert report.protocol is None


def test_of_many_classes_the_largest_and_the_smallest_are_shown(root):
    report = report_of(root)
    assert report.class_rows() == [
        ("label", "class", "training", "meta", "test"),
        ("0", "ant", "8", "8", "8"),
        ("1", "bee", "8", "8", "8"),
    ]
    report.parts["training"].per_class = {f"c{label}": 1000 - label for label in range(50)}
    report.parts = {"training": report.parts["training"]}
    rows = report.class_rows()
    assert [row[0] for row in rows[1:]] == [*map(str, range(10)), "...", *map(str, range(40, 50))]
    assert rows[-1] == ("49", "c49", "951")


def test_the_command_prints_a_table_and_writes_the_report(root, tmp_path, capsys):
    (root / "train/ant/1.jpg").write_bytes(b"")
    command = ["data", "check", "--dataset", "imagefolder", "--data-root", str(root), "--output", str(tmp_path / "out")]
    assert cli.main(command) == 2
    out, err = capsys.readouterr()
    assert "training  16" in out
    assert "Cannot read " in out
    assert "raise --max-bad-fraction" in err
    assert json.loads((tmp_path / "out/check.json").read_text())["parts"]["training"]["missing"] == 1
    assert "empty file" in (tmp_path / "out/bad_images.csv").read_text()
    assert cli.main([*command, "--max-bad-fraction", "0.1"]) == 0


def test_the_command_works_on_images_in_memory(tmp_path, capsys, monkeypatch):
    assert cli.main(["data", "check"]) == 0
    assert "training  1,300" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(command, "check_data", lambda *args: pytest.fail("read before the folder was made"))
    assert cli.main(["data", "check", "--output", str(tmp_path / "file")]) == 2
    assert "choose another --output" in capsys.readouterr().err
    assert cli.main(["data", "chek"]) == 2
    assert "has one command, check" in capsys.readouterr().err
