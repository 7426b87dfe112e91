"""Which image and which label a line of a list, a folder or a file of labels means: never another one's."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fastadvisor.config import CheckConfig, Config, resolve
from fastadvisor.data import load_source, prepare
from fastadvisor.data.check import check_data
from fastadvisor.errors import UserError

CLASSES = ("ant", "bee", "cat")


def fill(root, parts=("train", "test"), classes=CLASSES, count=8):
    """Write ROOT/<part>/<class>/000N.jpg; names repeat in every part, pictures do not."""
    for part in parts:
        for name in classes:
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                file = root / part / name / f"{number:04}.jpg"
                seed = [sum(map(ord, part)), sum(map(ord, name)), number]
                Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(file)
    return root


def lines(root, part, text, folder="", classes=CLASSES):
    """Write a list of the images of ROOT/<part>, relative to ``folder`` in the root."""
    rows = [f"{folder}{name}/{number:04}.jpg {label}" for label, name in enumerate(classes) for number in range(text)]
    (root / f"{part}.txt").write_text("\n".join(rows) + "\n")


def load(root, dataset="list", **settings):
    return load_source(resolve(Config, dataset=dataset, data_root=str(root), **settings))


def prepared(root, dataset="list", **settings):
    config = resolve(Config, dataset=dataset, data_root=str(root), **settings)
    return prepare(load_source(config), config, 0)


def names(split, root):
    return [os.path.relpath(split.images.name(row), root) for row in range(len(split))]


# Folders of the parts


@pytest.mark.parametrize("others", [("train", "test"), ("train", "test", "backup_wrong", "a_backup")])
def test_a_list_is_looked_for_in_the_folder_of_its_own_part(tmp_path, others):
    fill(tmp_path, others)
    lines(tmp_path, "train", 8)
    lines(tmp_path, "test", 8)
    source = load(tmp_path)
    assert names(source.train, tmp_path)[:2] == ["train/ant/0000.jpg", "train/ant/0001.jpg"]
    assert names(source.test, tmp_path)[:2] == ["test/ant/0000.jpg", "test/ant/0001.jpg"]


@pytest.mark.parametrize(("train", "test"), [("training", "testing"), ("train", "val")])
def test_the_other_names_of_the_folders(tmp_path, train, test):
    fill(tmp_path, (train, test))
    lines(tmp_path, "train", 8)
    lines(tmp_path, "test", 8)
    source = load(tmp_path)
    assert names(source.train, tmp_path)[0] == f"{train}/ant/0000.jpg"
    assert names(source.test, tmp_path)[0] == f"{test}/ant/0000.jpg"


def test_a_list_of_val_images_stands_in_for_test_and_is_in_val(tmp_path):
    fill(tmp_path, ("train", "test", "val"))
    lines(tmp_path, "train", 8)
    lines(tmp_path, "val", 8)
    assert names(load(tmp_path).test, tmp_path)[0] == "val/ant/0000.jpg"


def test_val_beside_test_is_for_choosing(tmp_path):
    fill(tmp_path, ("train", "test", "val"))
    for part in ("train", "test", "val"):
        lines(tmp_path, part, 8)
    source = load(tmp_path)
    assert names(source.test, tmp_path)[0] == "test/ant/0000.jpg"
    assert names(source.val, tmp_path)[0] == "val/ant/0000.jpg"
    assert names(load(tmp_path, "imagefolder").val, tmp_path)[0] == "val/ant/0000.jpg"


def test_never_in_the_folder_of_another_part(tmp_path):
    fill(tmp_path, ("test", "meta", "backup"))
    lines(tmp_path, "train", 8)
    lines(tmp_path, "test", 8)
    with pytest.raises(UserError, match=r"ant/0000.jpg of .*train.txt is not in .*: write the paths relative to"):
        load(tmp_path)


@pytest.mark.parametrize("part", ["train", "test", "meta"])
def test_two_places_that_fit_are_named(tmp_path, part):
    fill(tmp_path, ("train", "test", "meta"))
    for each in ("train", "test", "meta"):
        lines(tmp_path, each, 8, f"{each}/")
    assert len(load(tmp_path).meta) == 24
    lines(tmp_path, part, 8)
    fill(tmp_path, ("",), classes=("ant",))
    with pytest.raises(UserError) as error:
        load(tmp_path)
    assert f"The images of {tmp_path}/{part}.txt are in {tmp_path} and in {tmp_path}/{part}, and" in str(error.value)
    assert f"as in {part}/ant/0000.jpg" in str(error.value)


def test_one_place_by_two_ways_is_one(tmp_path):
    fill(tmp_path, ("train", "test"))
    (tmp_path / "training").symlink_to("train")
    for part in ("train", "test"):
        lines(tmp_path, part, 8)
    assert names(load(tmp_path).train, tmp_path)[0] == "train/ant/0000.jpg"


def test_lists_that_are_named_are_looked_for_alike(tmp_path):
    fill(tmp_path, ("train", "test", "meta", "backup"))
    (tmp_path / "lists").mkdir()
    for part in ("train", "test", "meta"):
        lines(tmp_path, part, 8)
        (tmp_path / f"{part}.txt").rename(tmp_path / f"lists/{part}-a.txt")
    named = {f"{part}_list": str(tmp_path / f"lists/{part}-a.txt") for part in ("train", "test", "meta")}
    source = load(tmp_path, **named)
    for part in ("train", "test", "meta"):
        assert names(getattr(source, part), tmp_path)[0] == f"{part}/ant/0000.jpg"


def test_the_long_tailed_lists_look_in_no_folder_of_another_part(tmp_path):
    for part, folder in (("train", "images/train"), ("val", "images/train"), ("test", "images/val")):
        fill(tmp_path, (folder, folder.replace("images", "meta")))
        lines(tmp_path, f"ImageNet_LT_{part}", 3, folder.removeprefix("images/") + "/")
    source = load(tmp_path, "imagenet-lt")
    assert names(source.train, tmp_path)[0] == "images/train/ant/0000.jpg"
    shutil.copytree(tmp_path / "images", tmp_path / "old")
    with pytest.raises(UserError, match=f"are in {tmp_path}/images and in {tmp_path}/old"):
        load(tmp_path, "imagenet-lt")


# Trusted images


@pytest.mark.parametrize("loader", ["resident", "torch"])
@pytest.mark.parametrize("prefix", ["train/", "", "/"], ids=["root", "train", "absolute"])
def test_trusted_training_images_become_the_meta_set(tmp_path, prefix, loader):
    root = fill(tmp_path / "photos")
    start = f"{root}/train/" if prefix == "/" else prefix
    trusted = [
        (f"{start}cat/0003.jpg", 2),
        (f"{start}ant/0001.jpg", 0),
        (f"{start}./ant/0007.jpg", 1),
        (f"{start}bee/0000.jpg", 1),
    ]
    (root / "verified.txt").write_text("\n".join(f"{path} {label}" for path, label in trusted))
    config = resolve(Config, dataset="imagefolder", data_root=str(root), meta_list="verified.txt", loader=loader, image_size=12)
    from fastadvisor.data import stage

    source = stage(load_source(config), config, torch.device("cpu"))
    data = prepare(source, config, 0)
    own = [f"train/{path.removeprefix(start).removeprefix('./')}" for path, _ in trusted]
    assert [os.path.relpath(data.images.name(row), root) for row in data.meta_ids.tolist()] == own
    assert data.labels[data.meta_ids].tolist() == [2, 0, 1, 1]  # 0007 is an ant in the folder, and a bee by the list
    assert data.true_labels[data.meta_ids].tolist() == [2, 0, 1, 1]
    assert len(data.train_ids) == 24 - 4
    assert not set(data.train_ids.tolist()) & set(data.meta_ids.tolist())
    assert len(data.images) == 24
    assert data.notes[-1].startswith("All 4 images of the meta-set are training images: they are taken out of the training set")


def test_trusted_images_of_both_kinds(tmp_path):
    fill(tmp_path)
    fill(tmp_path, ("meta",), count=1)
    shutil.move(tmp_path / "meta", tmp_path / "clean")  # not the folder of a part: the class folders would all be wanted
    paths = [f"clean/{name}/0000.jpg {label}" for label, name in enumerate(CLASSES)] + ["train/bee/0004.jpg 1"]
    (tmp_path / "verified.txt").write_text("\n".join(paths))
    data = prepared(tmp_path, "imagefolder", meta_list="verified.txt")
    found = [os.path.relpath(data.images.name(row), tmp_path) for row in data.meta_ids.tolist()]
    assert found == [line.split()[0] for line in paths]
    assert data.labels[data.meta_ids].tolist() == [0, 1, 2, 1]
    assert len(data.train_ids) == 23
    assert len(data.images) == 27


def test_labels_and_noise_leave_trusted_images_alone(tmp_path):
    fill(tmp_path)
    (tmp_path / "verified.txt").write_text("\n".join(f"train/{name}/0000.jpg {n}" for n, name in enumerate(CLASSES)))
    data = prepared(tmp_path, "imagefolder", meta_list="verified.txt", noise="uniform", noise_rate=1.0)
    assert data.labels[data.meta_ids].tolist() == [0, 1, 2]
    assert (data.labels[data.train_ids] != data.true_labels[data.train_ids]).any()


def test_trusted_images_of_the_test_set_are_refused(tmp_path):
    fill(tmp_path, ("train", "test", "val"))
    for part, verb in (("test", "tested on"), ("val", "chosen on")):
        (tmp_path / "verified.txt").write_text(f"train/ant/0001.jpg 0\n{part}/cat/0003.jpg 2\n")
        with pytest.raises(UserError, match=rf"{part}/cat/0003.jpg is named .* is a {part} image \(1 of 2 are\).*{verb}"):
            load(tmp_path, "imagefolder", meta_list="verified.txt")
    (tmp_path / "verified.txt").write_text("train/ant/0001.jpg 0\ntrain/ant/0001.jpg 1\n")
    with pytest.raises(UserError, match=r"train/ant/0001.jpg is named twice"):
        load(tmp_path, "imagefolder", meta_list="verified.txt")


def test_without_a_folder_it_is_the_training_image_of_that_name(tmp_path):
    """Both train/cat/0003.jpg and test/cat/0003.jpg are there."""
    fill(tmp_path)
    (tmp_path / "verified.txt").write_text("\n".join(f"{name}/0003.jpg {n}" for n, name in enumerate(CLASSES)))
    data = prepared(tmp_path, "imagefolder", meta_list="verified.txt")
    assert os.path.relpath(data.images.name(int(data.meta_ids[2])), tmp_path) == "train/cat/0003.jpg"
    fill(tmp_path, ("meta",))
    with pytest.raises(UserError, match=f"are in {tmp_path}/meta and in {tmp_path}/train, and"):
        load(tmp_path, "imagefolder", meta_list="verified.txt")


def test_a_copy_of_a_training_image_is_still_refused(tmp_path):
    fill(tmp_path)
    (tmp_path / "clean").mkdir()
    for number, name in enumerate(CLASSES):
        shutil.copy(tmp_path / f"train/{name}/0003.jpg", tmp_path / f"clean/{number}.jpg")
    (tmp_path / "verified.txt").write_text("\n".join(f"clean/{n}.jpg {n}" for n in range(3)))
    with pytest.raises(UserError, match=r"clean/0.jpg is also the training image .*train/ant/0003.jpg"):
        prepared(tmp_path, "imagefolder", meta_list="verified.txt")


def test_a_copy_of_a_trusted_training_image_is_refused_too(tmp_path):
    fill(tmp_path)
    shutil.copy(tmp_path / "train/ant/0003.jpg", tmp_path / "train/bee/again.jpg")
    (tmp_path / "verified.txt").write_text("\n".join(f"train/{name}/0003.jpg {n}" for n, name in enumerate(CLASSES)))
    with pytest.raises(UserError, match=r"train/ant/0003.jpg is also the training image .*train/bee/again.jpg"):
        prepared(tmp_path, "imagefolder", meta_list="verified.txt")


def test_data_check_knows_trusted_images(tmp_path):
    fill(tmp_path)
    (tmp_path / "verified.txt").write_text("\n".join(f"train/{name}/0003.jpg {n}" for n, name in enumerate(CLASSES)))
    config = resolve(CheckConfig, dataset="imagefolder", data_root=str(tmp_path), meta_list="verified.txt")
    report = check_data(load_source(config), config)
    assert report.problems == []
    assert report.shared["meta in training"] == 0
    assert report.protocol["training"] == 21
    assert "Note: All 3 images of the meta-set are training images" in "\n".join(report.remarks())


# Folders of images


def test_subfolders_are_read_in_torchvisions_order(tmp_path):
    from torchvision.datasets import ImageFolder

    fill(tmp_path, count=2)
    for place in ("train/ant/z", "train/ant/b", "train/ant/b/deep", "test/bee/more"):
        fill(tmp_path, (place,), classes=("",), count=2)
    source = load(tmp_path, "imagefolder")
    theirs = ImageFolder(str(tmp_path / "train"))
    assert names(source.train, tmp_path) == [os.path.relpath(path, tmp_path) for path, _ in theirs.samples]
    assert source.train.labels.tolist() == theirs.targets
    assert len(source.train) == 12
    assert source.notes == ()


@pytest.mark.parametrize("suffix", [".jfif", ".JPE", ".pgm", ".ppm", ".TIFF", ".webp", ".bmp"])
def test_what_counts_as_an_image(tmp_path, suffix):
    fill(tmp_path, count=2)
    (tmp_path / "train/ant/0001.jpg").rename(tmp_path / f"train/ant/0001{suffix}")
    assert len(load(tmp_path, "imagefolder").train) == 6


def test_what_is_passed_over_is_counted_by_kind(tmp_path):
    fill(tmp_path)
    train = tmp_path / "train"
    for number in range(4):
        (train / f"ant/{number}.heic").write_bytes(b"x")
        (train / f"bee/{number}.jpg").symlink_to("nowhere.jpg")
    (train / "bee/loop").symlink_to("..")
    (train / "bee/self.jpg").symlink_to("self.jpg")
    (train / "cat/.DS_Store").write_bytes(b"x")
    (train / "cat/.thumbs").mkdir()
    (train / "cat/notes").write_bytes(b"x")
    (train / "lone.jpg").write_bytes(b"x")
    (train / "labels.csv").write_bytes(b"x")
    os.mkfifo(train / "cat/pipe.jpg")
    (tmp_path / "test/cat/a.txt").write_bytes(b"x")
    source = load(tmp_path, "imagefolder")
    (note,) = source.notes
    assert len(source.train) == 24
    assert note.startswith("17 files were passed over: in ")
    for kind in (
        ".heic (not read here, convert them): 4",
        "dangling links: 5",
        "links to folders they are in: 1",
        "hidden: 1,",
        "hidden folders: 1",
        "without an extension: 1",
        "images in no class folder: 1",
        ".csv: 1",
        "neither files nor folders: 1",
        f"; in {tmp_path}/test .txt: 1.",
    ):
        assert kind in note
    assert prepare(source, resolve(Config, dataset="imagefolder", meta_per_class=1), 0).notes == (note,)
