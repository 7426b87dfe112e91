"""Which image and which label a line of a list, a folder or a file of labels means: never another one's."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import fastadvisor
from fastadvisor.commands.check_data import check_data
from fastadvisor.config import CheckConfig, Config, resolve
from fastadvisor.datasets import load_source, prepare
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
    from fastadvisor.loading import cache_images

    source = cache_images(load_source(config), config, torch.device("cpu"))
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


# One image by several ways of writing its path


def written(root, part, kind):
    """Return what ``kind`` of path a list has before <class>/000N.jpg of ROOT/<part>."""
    return {"absolute": f"{root}/{part}/", "up": f"../{root.name}/{part}/", "plain": f"{part}/"}[kind]


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("mine", ["absolute", "up", "plain"])
@pytest.mark.parametrize("theirs", ["absolute", "up", "plain"])
def test_an_image_is_known_by_any_way_of_writing_its_path(tmp_path, theirs, mine, linked):
    root = tmp_path / "root"
    fill(root)
    if linked:
        for part in ("train", "test"):
            shutil.move(root / part / "bee", tmp_path / f"bee_{part}")
            (root / part / "bee").symlink_to(tmp_path / f"bee_{part}")
    for part in ("train", "test"):
        lines(root, part, 8, written(root, part, theirs))
    meta = root / "trusted.txt"
    meta.write_text("".join(f"{written(root, 'train', mine)}{name}/0003.jpg {label}\n" for label, name in enumerate(CLASSES)))
    data = prepared(root, meta_list=str(meta))
    assert (len(data.train_ids), data.meta_ids.tolist()) == (21, [3, 11, 19])
    meta.write_text(f"{written(root, 'test', mine)}bee/0003.jpg 1\n")
    with pytest.raises(UserError, match="is a test image"):
        prepared(root, meta_list=str(meta))
    labels = tmp_path / "labels.csv"
    labels.write_text(f"path,label\n{written(root, 'train', mine)}bee/0001.jpg,cat\n")
    if mine != "up":  # those are relative to the root here
        found = load_source(resolve(Config, dataset="list", data_root=str(root)))
        (root / "classes.txt").write_text("\n".join(CLASSES))
        data = prepared(root, labels=str(labels), meta_per_class=2)
        assert torch.nonzero(data.labels != found.train.labels).flatten().tolist() in ([9], [])
        assert int(data.labels[9]) in (1, 2)


def test_an_image_that_the_training_list_names_twice(tmp_path):
    fill(tmp_path)
    lines(tmp_path, "train", 8)
    lines(tmp_path, "test", 8)
    with open(tmp_path / "train.txt", "a") as file:
        file.write("ant/0003.jpg 0\nbee/0000.jpg 1\n")
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    trusted = tmp_path / "trusted.txt"
    trusted.write_text("".join(f"train/{name}/0003.jpg {label}\n" for label, name in enumerate(CLASSES)))
    data = prepared(tmp_path, meta_list=str(trusted))
    assert not {3, 24} & set(data.train_ids.tolist())  # the other row of the trusted image is out, too
    labels = tmp_path / "labels.csv"
    labels.write_text("path,label\nbee/0000.jpg,cat\nbee/0000.jpg,cat\n")
    data = prepared(tmp_path, meta_list=str(trusted), labels=str(labels))
    assert data.labels[[8, 25]].tolist() == [2, 2]
    labels.write_text("path,label\nbee/0000.jpg,cat\nbee/0000.jpg,ant\n")
    with pytest.raises(UserError, match=r"two labels for bee/0000.jpg, one in row 2 and one in row 3"):
        prepared(tmp_path, meta_list=str(trusted), labels=str(labels))


def test_a_trusted_image_with_two_labels(tmp_path):
    fill(tmp_path, ("train", "test", "extra"))
    lines(tmp_path, "train", 8, "train/")
    lines(tmp_path, "test", 8, "test/")
    (tmp_path / "meta.txt").write_text("".join(f"extra/{name}/0003.jpg {n}\n" for n, name in enumerate(CLASSES)))
    prepared(tmp_path)
    with open(tmp_path / "meta.txt", "a") as file:
        file.write("./extra/ant/0003.jpg 2\n")
    with pytest.raises(UserError, match="named twice as an image of the meta-set, with two labels"):
        prepared(tmp_path)


def test_trusted_images_written_as_the_training_images_are(tmp_path):
    fill(tmp_path)
    lines(tmp_path, "train", 8)
    lines(tmp_path, "test", 8)
    trusted = tmp_path / "trusted.txt"
    trusted.write_text("".join(f"{name}/0003.jpg {label}\n" for label, name in enumerate(CLASSES)))
    assert prepared(tmp_path, meta_list=str(trusted)).meta_ids.tolist() == [3, 11, 19]


# Two lists that may be meant


def test_the_split_of_a_csv_comes_before_a_list_that_nobody_named(tmp_path):
    fill(tmp_path)
    rows = [f"{part}/{name}/{n:04}.jpg,{name},{part}" for part in ("train", "test") for name in CLASSES for n in range(8)]
    (tmp_path / "all.csv").write_text("\n".join(["path,label,split", *rows]))
    (tmp_path / "test.csv").write_text("ImageId\n1\n")
    source = load(tmp_path, train_list=str(tmp_path / "all.csv"))
    assert len(source.test) == 24
    assert any("test.csv is not read" in note for note in source.notes)


def test_a_list_here_and_one_in_the_root(tmp_path, monkeypatch):
    root = fill(tmp_path / "root")
    lines(root, "train", 8)
    lines(root, "test", 8)
    monkeypatch.chdir(root)
    assert len(load(root, train_list="train.txt").train) == 24
    monkeypatch.chdir(tmp_path)
    assert len(load(root, train_list="train.txt").train) == 24
    lines(tmp_path, "train", 2)
    with pytest.raises(UserError, match=r"two lists train.txt, here and in"):
        load(root, train_list="train.txt")


def test_names_that_are_digits_are_names_in_every_list(tmp_path):
    classes = ("747", "A320")
    fill(tmp_path, classes=classes)
    for part, some in (("train", classes), ("test", classes), ("meta", classes[:1])):
        rows = [f"{'train' if part == 'meta' else part}/{name}/{n:04}.jpg,{name}" for name in some for n in range(3)]
        (tmp_path / f"{part}.csv").write_text("\n".join(["path,label", *rows]))
    source = load(tmp_path)
    assert source.classes == list(classes)
    assert source.meta.labels.tolist() == [0, 0, 0]


def test_labels_of_val_images_are_looked_at(tmp_path):
    fill(tmp_path, ("train", "test", "val"))
    for part in ("train", "test", "val"):
        lines(tmp_path, part, 8)
    source = load(tmp_path)
    source.val.labels[0] = 3
    with pytest.raises(UserError, match="the val label at position 0 is 3, and there are 3 classes"):
        prepare(source, resolve(Config, dataset="list", meta_per_class=2), 0)


@pytest.mark.parametrize(
    ("header", "cells"),
    [
        ("photo", "0001.jpg 0000.jpg 0002.jpg"),
        ("", "2 0 1"),
        ("Unnamed: 0", "7 3 5"),
    ],
)
def test_a_column_that_seems_to_say_which_image_is_not_passed_over(tmp_path, header, cells):
    fill(tmp_path, count=3)
    labels = tmp_path / "labels.csv"
    rows = cells.split() * 3 if header == "photo" else [str(3 * n + int(cell)) for n in range(3) for cell in cells.split()]
    rows = [f"{place}{cell}" for place, cell in enumerate(rows)] if header == "photo" else rows
    labels.write_text("\n".join([f"{header},label", *(f"{row},ant" for row in rows)]))
    with pytest.raises(UserError, match="seems to say which image a row is about"):
        prepared(tmp_path, "imagefolder", labels=str(labels), meta_per_class=1)
    labels.write_text("\n".join(["row,score,label", *(f"{row},0.{row},ant" for row in range(9))]))
    assert prepared(tmp_path, "imagefolder", labels=str(labels), meta_per_class=1).labels.sum() >= 0


def test_lists_move_with_the_root_they_are_in(tmp_path, monkeypatch):
    """A run is evaluated and resumed after its data has moved, list and all."""
    root = fill(tmp_path / "root", classes=CLASSES[:2], count=4)
    for part in ("train", "test"):
        lines(root, part, 4, f"{part}/", CLASSES[:2])
    (root / "train.txt").rename(root / "mine.txt")
    settings = {"dataset": "list", "train_list": "mine.txt", "model": "resnet8", "method": "ce", "batch_size": 4}
    settings |= {"meta_per_class": 1, "progress": False, "tensorboard": False, "device": "cpu"}
    run = tmp_path / "run"
    fastadvisor.train(data_root=str(root), epochs=1, schedule="constant", output=str(run), **settings)
    root.rename(tmp_path / "moved")
    before = fastadvisor.evaluate(run, data_root=tmp_path / "moved")
    assert before["top1"] >= 0
    fastadvisor.train(str(run / "config.yaml"), data_root=tmp_path / "moved", output=run, resume=True, epochs=2, progress=False)
    assert fastadvisor.evaluate(run)["top1"] >= 0  # from where it lies now
