"""Every layout of a data set as it lies on disk, from the files to the batches of both loaders.

The images are generated; with FASTADVISOR_CIFAR10 naming a folder of the real ones (train/<class>/*.jpg) they are those too.
"""

import io
import itertools
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fastadvisor.config import Config, resolve
from fastadvisor.datasets import load_source, prepare
from fastadvisor.datasets.readers import READERS, animal10n
from fastadvisor.errors import UserError
from fastadvisor.loading import build_loaders
from fastadvisor.loading.backends import dali
from tests.photos import encoded, photo

CPU = torch.device("cpu")
REAL = os.environ.get("FASTADVISOR_CIFAR10")
LARGEST = 120
PARTS = ("train", "meta", "test")


@pytest.fixture(autouse=True)
def no_cache_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module", params=["generated", "cifar10"])
def pool(request):
    """Different JPEGs, as many as the largest layout takes."""
    if request.param == "generated":
        return [encoded(photo(*((40, 30) if seed % 2 else (30, 40)), seed=seed), quality=90) for seed in range(LARGEST)]
    if REAL is None:
        pytest.skip("FASTADVISOR_CIFAR10 does not name a folder of real images")
    return [path.read_bytes() for path in itertools.islice(sorted(Path(REAL).rglob("*.jpg")), 0, None, 7)][:LARGEST]


class Layout:
    """Files that have been written, and what a reader should make of them."""

    def __init__(self, root, pool):
        self.root, self.pool = root, iter(pool)
        self.expected = {part: [] for part in PARTS}
        self.settings = {}

    def image(self, path, part=None, label=None):
        """Write the next image; it is of ``part`` with ``label``."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        content = next(self.pool)
        file.write_bytes(content)
        if part is not None:
            self.expected[part].append((content, label))

    def text(self, path, lines, end="\n", start=""):
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes((start + end.join(lines) + end).encode())


def imagefolder(layout):
    for part, name, number in itertools.product(PARTS, ("ant", "bée 2"), range(3)):
        layout.image(f"{part}/{name}/{number}.jpg", part, ("ant", "bée 2").index(name))


def list_files(layout, end="\r\n", start="\ufeff"):
    layout.text("classes.txt", ["ant", "bee"], end)
    for part in PARTS:
        lines = []
        for number in range(6):
            path = f"pictures/{part} {number % 3}/é{number}.jpg"
            layout.image(path, part, number % 2)
            lines.append(f"{path} {number % 2}")
        layout.text(f"{'val' if part == 'test' else part}.txt", lines, end, start)


def list_csv(layout):
    rows = ["label,path,split,comment"]
    for number, part in enumerate(("train", "test", "meta", "train", "train", "meta", "test", "train") * 2):
        name = ("bee", "ant")[number // 3 % 2]
        layout.image(f"{number}, of all.jpg", part, ("ant", "bee").index(name))
        rows.append(f'{name},"{number}, of all.jpg",{part},"x, y"')
    layout.text("train.csv", rows)


def list_named(layout):
    """Lists elsewhere, named by flags, and images in the root."""
    layout.settings = {"train_list": str(layout.root / "lists/a.txt"), "test_list": "lists/b.csv", "meta_per_class": 1}
    for name, part in (("a.txt", "train"), ("b.csv", "test")):
        rows = [] if part == "train" else ["path,label"]
        for number in range(6):
            layout.image(f"img/{part}{number}.jpg", part, number % 3)
            rows.append(f"img/{part}{number}.jpg{' ' if part == 'train' else ','}{number % 3}")
        layout.text(f"lists/{name}", rows)
    layout.classes = ["0", "1", "2"]


def _long_tail(layout, lists, folder, classes, parts):
    layout.settings = {"meta_per_class": 2}
    layout.classes = classes
    for part, named, counts in parts:
        lines = []
        for label, count in enumerate(counts):
            for number in range(count):
                path = f"{named}/{classes[label]}/{number}.JPEG"
                layout.image(f"{folder}/{path}", part, label)
                lines.append(f"{path} {label}")
        layout.text(f"{lists}_{'val' if part == 'meta' else part}.txt", lines)


def imagenet_lt(layout):
    parts = (("train", "train", (6, 3, 2)), ("meta", "train", (3, 3, 3)), ("test", "val", (2, 2, 2)))
    # The val list names files of train/, other ones than the training list.
    layout.settings = {}
    classes = ["n01440764", "n01443537", "n01484850"]
    _long_tail(layout, "ImageNet_LT", ".", classes, [(part, f"{named}/{part[0]}", counts) for part, named, counts in parts])
    for name in ("train", "val", "test"):
        file = layout.root / f"ImageNet_LT_{name}.txt"
        lines = file.read_text().splitlines()
        moved = []
        for line in lines:  # train/t/n01440764/0.JPEG -> train/n01440764/t0.JPEG, as in the real lists
            path, label = line.split()
            top, letter, synset, base = path.split("/")
            (layout.root / top / synset).mkdir(parents=True, exist_ok=True)
            (layout.root / path).rename(layout.root / top / synset / f"{letter}{base}")
            moved.append(f"{top}/{synset}/{letter}{base} {label}")
        layout.text(f"ImageNet_LT_{name}.txt", moved)


def places_lt(layout):
    classes = ["airfield", "apartment_building/outdoor", "zen_garden"]
    parts = (("train", "data_256/a", (6, 3, 2)), ("meta", "data_256/b", (3, 3, 3)), ("test", "data_256/c", (2, 2, 2)))
    _long_tail(layout, "Places_LT", "places", classes, parts)


def clothing1m(layout, annotations=".", prefix=("images/", "images/"), end="\n", variant=None):
    """``prefix``: of the paths in the label and in the key lists."""
    layout.classes = ["T-Shirt", "Down Coat"]
    layout.settings = {"variant": variant} if variant else {}
    kept = {"noisy": [], "clean": []}
    keys = {part: [] for part in ("noisy_train", "clean_train", "clean_val", "clean_test")}
    both = variant == "clean-and-noisy"
    parts = {"noisy_train": "train", "clean_train": "train" if both else None, "clean_val": "meta", "clean_test": "test"}
    for part, number in itertools.product(keys, range(6)):
        path = f"{number}/0{number}/{part}{number},1.jpg"
        layout.image(f"images/{path}", parts[part], number % 2)
        keys[part].append(prefix[1] + path)
        kept[part.partition("_")[0]].append(f"{prefix[0]}{path} {number % 2}")
    if both:  # one image has both kinds of label: the verified one counts
        shared = keys["noisy_train"][0].removeprefix(prefix[1])
        keys["clean_train"].insert(0, prefix[1] + shared)
        kept["clean"].append(f"{prefix[0]}{shared} 1")
        content, _ = layout.expected["train"].pop(0)
        layout.expected["train"].insert(5, (content, 1))
    layout.text(f"{annotations}/category_names_eng.txt", layout.classes, end)
    for kind, lines in kept.items():
        layout.text(f"{annotations}/{kind}_label_kv.txt", lines[::-1], end)
    for part, lines in keys.items():
        layout.text(f"{annotations}/{part}_key_list.txt", lines, end)


def clothing1m_in_parts(layout):
    clothing1m(layout, annotations="annotations", prefix=("", "images/"), end="\r\n")


def clothing1m_clean_and_noisy(layout):
    clothing1m(layout, prefix=("images/", ""), variant="clean-and-noisy")


def webvision(layout, mini=False):
    layout.classes = ["tench", "crane (n02012849)", "crane (n03126707)"]
    layout.text("info/synsets.txt", ["n01440764 tench, Tinca tinca", "n02012849 crane", "n03126707 crane"])
    layout.settings = {"meta_per_class": 1} | ({"variant": "mini"} if mini else {})
    train, test = [], []
    if mini:
        layout.classes = [str(number) for number in range(50)]
        (layout.root / "info/synsets.txt").unlink()
    for number in range(110 if mini else 6):
        label = number % (55 if mini else 3)
        part = "train" if not mini or label < 50 else None
        layout.image(f"google/q000{number % 4}/{number}.jpg", part, label)
        train.append(f"google/q000{number % 4}/{number}.jpg {label}")
    for number in range(6):
        layout.image(f"val_images_256/val{number}.jpg", "test", number % 3)
        test.append(f"val{number}.jpg {number % 3}")
    layout.text("info/train_filelist_google.txt", train)
    layout.text("info/val_filelist.txt", test)


def food101n(layout, clean_test=True):
    layout.classes = ["apple_pie", "baby_back_ribs"]
    layout.text("meta/classes.txt", ["class_name", *layout.classes])
    keys, verified = ["class_name/key"], {part: ["class_name/key\tverification_label"] for part in ("train", "val")}
    for number in range(12):
        label = number % 2
        key = f"{layout.classes[label]}/{number}.jpg"
        right, listed = number < 8, "train" if number % 4 < 2 else "val"
        part = "train"
        if number < 10:
            verified[listed].append(f"{key}\t{int(right)}")
            if right and listed == "train":
                part = "meta"
            elif right and not clean_test:
                part = "test"
        layout.image(f"images/{key}", part, label)
        keys.append(key)
    layout.text("meta/imagelist.tsv", keys)
    for part, lines in verified.items():
        layout.text(f"meta/verified_{part}.tsv", lines)
    if clean_test:
        tests = [f"{name}/10{number}" for name in layout.classes for number in range(2)]
        for key in tests:
            layout.image(f"food-101/images/{key}.jpg", "test", layout.classes.index(key.partition("/")[0]))
        layout.text("food-101/meta/test.txt", tests)


def animals(layout):
    layout.classes = list(animal10n.CLASSES)
    layout.settings = {"meta_per_class": 1}
    for part, folder, count in (("train", "training", 2), ("test", "testing", 1)):
        for label, number in itertools.product(range(10), range(count)):
            layout.image(f"raw_image/{folder}/{label}_{number}00.jpg", part, label)


def webdataset(layout):
    layout.text("classes.txt", ["ant", "bee"])
    for part, shard in itertools.product(PARTS, range(2)):
        name = {"train": f"train/{shard:03}.tar", "test": f"my-val-{shard}.tar", "meta": f"meta_{shard}.tar"}[part]
        (layout.root / name).parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(layout.root / name, "w") as tar:
            for number in range(4):
                content, label = next(layout.pool), number % 2
                layout.expected[part].append((content, label))
                told = {"json": json.dumps({"label": label, "caption": "é"}), "cls": str(label)}
                extension = "json" if shard else "cls"
                members = {"jpg": content, extension: told[extension].encode(), "txt": b"passed over"}
                for kind, data in members.items():
                    member = tarfile.TarInfo(f"./sub.dir/{number} é.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


LAYOUTS = {
    "imagefolder": (imagefolder, "imagefolder"),
    "list": (list_files, "list"),
    "list in csv": (list_csv, "list"),
    "list by flags": (list_named, "list"),
    "imagenet-lt": (imagenet_lt, "imagenet-lt"),
    "places-lt": (places_lt, "places-lt"),
    "clothing1m": (clothing1m, "clothing1m"),
    "clothing1m in parts": (clothing1m_in_parts, "clothing1m"),
    "clothing1m clean and noisy": (clothing1m_clean_and_noisy, "clothing1m"),
    "webvision": (webvision, "webvision"),
    "webvision mini": (lambda layout: webvision(layout, mini=True), "webvision"),
    "food101n": (food101n, "food101n"),
    "animal10n": (animals, "animal10n"),
    "webdataset": (webdataset, "webdataset"),
}
DRAWN = {"list by flags", "webvision", "webvision mini", "animal10n"}
"""Without a meta-set of their own."""


@pytest.fixture(params=LAYOUTS)
def layout(request, tmp_path, pool):
    build, dataset = LAYOUTS[request.param]
    made = Layout(tmp_path / "a root", pool)
    made.classes = ["ant", "bee"]
    build(made)
    made.name, made.settings = request.param, {"dataset": dataset, "data_root": str(made.root), **made.settings}
    if request.param == "imagefolder":
        made.classes = ["ant", "bée 2"]
    return made


def test_every_reader_has_a_layout_here():
    assert {dataset for _, dataset in LAYOUTS.values()} == set(READERS) - {"digits", "cifar10", "cifar100"}


def test_a_reader_finds_images_labels_and_parts_in_their_order(layout):
    source = load_source(resolve(Config, **layout.settings))
    assert source.classes == layout.classes
    assert (source.meta is None) == (layout.name in DRAWN)
    for part in PARTS:
        split = getattr(source, part)
        wanted = layout.expected[part]
        assert wanted == [] if split is None else split.labels.tolist() == [label for _, label in wanted]
        for row, (content, _) in enumerate(wanted):
            assert split.images.encoded(row) == content
    if source.name in ("imagenet-lt", "places-lt", "clothing1m", "webvision", "food101n"):
        assert source.image_size == 224
    if source.name == "clothing1m":
        assert source.mean == (0.6959, 0.6537, 0.6371)


def test_the_meta_set_is_the_data_sets_own_or_drawn(layout):
    config = resolve(Config, **layout.settings)
    source = load_source(config)
    data = prepare(source, config, 0)
    assert data.meta_held_out == (layout.name in DRAWN)
    meta, train = set(data.meta_ids.tolist()), set(data.train_ids.tolist())
    assert not meta & train
    if layout.name in DRAWN:
        assert len(meta) == config.meta_per_class * len(layout.classes)
        assert len(meta) + len(train) == len(source.train)
    elif source.meta_drawn:
        labels = data.labels[data.meta_ids]
        assert torch.bincount(labels).tolist() == [2] * len(layout.classes)
    else:
        assert [data.images.encoded(row) for row in sorted(meta)] == [content for content, _ in layout.expected["meta"]]


@pytest.mark.skipif(not dali.available(), reason="NVIDIA DALI is not installed")
def test_both_loaders_deliver_every_image_once_with_its_label(layout):
    batches = {}
    for name in ("torch", "dali"):
        usual = {"loader": name, "workers": 0 if name == "torch" else 1, "image_size": 24, "batch_size": 2, "crop": "random"}
        config = resolve(Config, **{**layout.settings, **usual, "meta_batch_size": 2, "eval_batch_size": 4, "resize_size": 24})
        data = prepare(load_source(config), config, 0)
        loaders = build_loaders(config, data, CPU)
        try:
            batches[name] = {
                "train": [loaders.train.next_batch() for _ in range(len(loaders.train))],
                "meta": [loaders.meta.next_batch() for _ in range(len(loaders.meta))],
                "test": list(loaders.test),
            }
        finally:
            loaders.close()
    for part, wanted in (("train", data.train_ids), ("meta", data.meta_ids), ("test", torch.arange(len(data.test)))):
        ids = torch.cat([batch.ids for batch in batches["torch"][part]])
        assert len(ids) == len(wanted) // 2 * 2 if part != "test" else len(wanted)
        assert len(set(ids.tolist())) == len(ids)
        assert set(ids.tolist()) <= set(wanted.tolist())
        labels = data.test.labels if part == "test" else data.labels
        for one, two in zip(batches["torch"][part], batches["dali"][part], strict=True):
            assert torch.equal(one.ids, two.ids)
            assert torch.equal(one.labels, labels[one.ids])
            assert torch.equal(two.labels, one.labels)
            assert float((one.images - two.images).abs().mean()) < 0.5 / (255 * 0.22)


def made(tmp_path, build, **settings):
    layout = Layout(tmp_path / "root", [encoded(photo(12, 12, seed=n)) for n in range(100)])
    build(layout)
    return layout, {"data_root": str(layout.root), **layout.settings, **settings}


def refused(settings):
    with pytest.raises(UserError) as error:
        load_source(resolve(Config, **settings))
    return str(error.value)


@pytest.mark.parametrize(
    ("build", "dataset", "file", "sentence"),
    [
        (imagenet_lt, "imagenet-lt", "ImageNet_LT_val.txt", "There is no ImageNet_LT_val.txt in"),
        (places_lt, "places-lt", "Places_LT_train.txt", "There is no Places_LT_train.txt in"),
        (clothing1m, "clothing1m", "category_names_eng.txt", "There is no category_names_eng.txt in"),
        (clothing1m_in_parts, "clothing1m", "annotations/clean_test_key_list.txt", "There is no clean_test_key_list.txt in"),
        (webvision, "webvision", "info/val_filelist.txt", "There is no val_filelist.txt in"),
        (food101n, "food101n", "meta/imagelist.tsv", "imagelist.tsv: --data-root must be the folder of Food-101N"),
        (list_files, "list", "val.txt", "There are no test images: add a column split to"),
        (list_files, "list", "train.txt", "name the list with --train-list"),
        (webdataset, "webdataset", "my-val-0.tar", None),
    ],
)
def test_a_missing_list_is_named(tmp_path, build, dataset, file, sentence):
    layout, settings = made(tmp_path, build, dataset=dataset)
    (layout.root / file).unlink()
    if sentence is None:  # one shard of two: the rest is a data set too
        assert len(load_source(resolve(Config, **settings)).test) == 4
        (layout.root / "my-val-1.tar").unlink()
        sentence = "There are no test shards in"
    assert sentence in refused(settings)


@pytest.mark.parametrize("dataset", sorted(set(READERS) - {"digits", "cifar10", "cifar100", "list"}))
def test_every_reader_says_what_its_root_should_hold(tmp_path, dataset):
    assert f"{dataset} needs --data-root DIR" in refused({"dataset": dataset})
    assert "There is no folder" in refused({"dataset": dataset, "data_root": str(tmp_path / "none")})
    assert str(tmp_path) in refused({"dataset": dataset, "data_root": str(tmp_path)})


def test_list_needs_a_list():
    assert "list needs --train-list FILE" in refused({"dataset": "list"})
    assert "There is no list nowhere.txt: check --train-list" in refused({"dataset": "list", "train_list": "nowhere.txt"})
    assert "--train-list is for --dataset list" in refused({"dataset": "webvision", "train_list": "x.txt"})
    assert "--meta-list is for data sets of files" in refused({"dataset": "digits", "meta_list": "x.txt"})


def test_images_that_are_nowhere(tmp_path):
    layout, settings = made(tmp_path, imagenet_lt, dataset="imagenet-lt")
    (layout.root / "train").rename(layout.root / "train of old")
    assert "is neither in" in refused(settings)


def test_lists_and_images_in_folders_of_their_own(tmp_path):
    layout, settings = made(tmp_path, imagenet_lt, dataset="imagenet-lt")
    for folder, names in (
        ("ImageNet", ("train", "val")),
        ("lists", [f"ImageNet_LT_{part}.txt" for part in ("train", "val", "test")]),
    ):
        (layout.root / folder).mkdir()
        for name in names:
            (layout.root / name).rename(layout.root / folder / name)
    source = load_source(resolve(Config, **settings))
    assert source.train.images.encoded(3) == layout.expected["train"][3][0]


def test_keys_without_a_label_are_counted(tmp_path):
    layout, settings = made(tmp_path, clothing1m, dataset="clothing1m")
    file = layout.root / "noisy_label_kv.txt"
    file.write_text("\n".join(file.read_text().splitlines()[:-2]))
    assert "lists 0/00/noisy_train0,1.jpg, which has no label in noisy_label_kv.txt (2 of 6 have none)" in refused(settings)


def test_variants_are_named_where_there_are_some(tmp_path):
    assert "no variant of animal10n" in refused({"dataset": "animal10n", "variant": "mini"})
    assert "clothing1m (noisy or clean-and-noisy)" in refused({"dataset": "clothing1m", "variant": "clean"})


def test_food101n_without_food101_says_what_it_tests_on(tmp_path):
    layout, settings = made(tmp_path, lambda layout: food101n(layout, clean_test=False), dataset="food101n")
    with pytest.warns(UserWarning, match="stand in for Food-101's test images"):
        source = load_source(resolve(Config, **settings))
    assert [source.test.images.encoded(row) for row in range(len(source.test))] == [c for c, _ in layout.expected["test"]]
    assert len(source.train) == len(layout.expected["train"])


def test_a_verdict_that_is_none(tmp_path):
    layout, settings = made(tmp_path, food101n, dataset="food101n")
    (layout.root / "meta/verified_train.tsv").write_text("header\napple_pie/0.jpg\tyes\n")
    assert "row 2: 'apple_pie/0.jpg\\tyes' is not a key, a tab and 0 or 1" in refused(settings)
    (layout.root / "meta/verified_train.tsv").write_text("header\nsoup/0.jpg\t1\n")
    assert "soup/0.jpg is of a class that is not in meta/classes.txt" in refused(settings)


def test_an_animal_without_a_label(tmp_path):
    layout, settings = made(tmp_path, animals, dataset="animal10n")
    layout.image("raw_image/training/10_7.jpg")
    assert "10_7.jpg: its name does not begin with a label, as in 3_1234.jpg (3: coyote)" in refused(settings)


def test_names_and_numbers_do_not_mix(tmp_path):
    layout, settings = made(tmp_path, list_csv, dataset="list")
    layout.text("test.txt", ["1, of all.jpg 0"])
    assert "are numbers and those of" in refused({**settings, "test_list": "test.txt"})
    layout.text("test.csv", ["path,label", '"1, of all.jpg",wasp'])
    settings = {**settings, "test_list": "test.csv"}
    source = load_source(resolve(Config, **settings))
    assert source.classes == ["ant", "bee", "wasp"]  # a run would refuse it: wasp has no training images
    layout.text("classes.txt", ["ant", "bee"])
    assert "the label 'wasp' of" in refused(settings)


def test_a_csv_with_both_val_and_test(tmp_path):
    layout, settings = made(tmp_path, list_csv, dataset="list")
    layout.image("v.jpg")
    file = layout.root / "train.csv"
    file.write_text(file.read_text() + "ant,v.jpg,val,\n")
    source = load_source(resolve(Config, **settings))
    assert len(source.test) == len(layout.expected["test"])
    assert [source.val.images.name(0), source.val.labels.tolist()] == [str(layout.root / "v.jpg"), [0]]
    file.write_text(file.read_text().replace(",train,", ",meta,"))
    assert "holds no train" in refused(settings)


def test_a_csv_with_splits_gives_each_list_its_own_rows(tmp_path):
    """Named as the test list too, it must not hand out its training images."""
    layout, settings = made(tmp_path, list_csv, dataset="list")
    named = {part: str(layout.root / "train.csv") for part in ("train_list", "test_list", "meta_list")}
    source = load_source(resolve(Config, **settings, **named))
    for part in PARTS:
        split, wanted = getattr(source, part), layout.expected[part]
        assert [split.images.encoded(row) for row in range(len(split))] == [content for content, _ in wanted]
        assert split.labels.tolist() == [label for _, label in wanted]
    layout.text("only.csv", ["path,label,split", '"0, of all.jpg",ant,train'])
    assert "only.csv holds no test: mark its images with it" in refused({**settings, "test_list": "only.csv"})


@pytest.mark.parametrize("label", ["-1", "1.0", "+1", "12345678901"])
def test_a_number_that_is_no_class_number_does_not_become_a_name(tmp_path, label):
    layout, settings = made(tmp_path, lambda layout: layout.image("a.jpg"), dataset="list")
    layout.text("train.csv", ["path,label,split", "a.jpg,0,train", "a.jpg,0,test", f"a.jpg,{label},train"])
    assert f"has the label {label!r}, and class numbers are 0, 1, 2, ...: correct it" in refused(settings)


def test_reading_opens_no_image_and_looks_for_a_few(tmp_path, monkeypatch):
    layout, settings = made(tmp_path, clothing1m, dataset="clothing1m")
    for image in layout.root.rglob("*.jpg"):
        image.write_bytes(b"")
    looked_for = []
    real = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: looked_for.append(path) or real(path))
    assert load_source(resolve(Config, **settings)).train.labels.tolist() == [0, 1] * 3
    assert len(looked_for) <= 3 * 2 * 5  # three lists, the root and images/, five files


def test_a_class_without_training_images_leaves_the_others_their_names(tmp_path):
    layout, settings = made(tmp_path, imagenet_lt, dataset="imagenet-lt")
    file = layout.root / "ImageNet_LT_train.txt"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.endswith(" 1\n")))
    assert load_source(resolve(Config, **settings)).classes == ["n01440764", "1", "n01484850"]


@pytest.mark.parametrize("file", ["verified_train.tsv", "imagelist.tsv"])
def test_a_list_of_food101n_that_leaves_nothing_is_named(tmp_path, file):
    layout, settings = made(tmp_path, food101n, dataset="food101n")
    layout.text(f"meta/{file}", ["class_name/key"])
    assert f"{file} leaves no images to use" in refused(settings)


def test_food101n_without_its_images(tmp_path):
    layout, settings = made(tmp_path, food101n, dataset="food101n")
    (layout.root / "images").rename(tmp_path / "elsewhere")
    assert "imagelist.tsv is not in" in refused(settings)


def test_animals_without_images_or_folders(tmp_path):
    layout, settings = made(tmp_path, animals, dataset="animal10n")
    (layout.root / "raw_image").rename(layout.root / "raw_image_ver")
    assert len(load_source(resolve(Config, **settings)).test) == 10
    testing = layout.root / "raw_image_ver/testing"
    for image in testing.iterdir():
        image.unlink()
    assert "testing holds no images" in refused(settings)
    testing.rmdir()
    assert "must hold training/ and testing/" in refused(settings)


def test_mini_without_any_of_its_classes(tmp_path):
    layout, settings = made(tmp_path, webvision, dataset="webvision")
    layout.text("info/train_filelist_google.txt", [f"google/q0000/0.jpg {label}" for label in range(50, 55)] * 20)
    (layout.root / "info/synsets.txt").unlink()
    assert "--variant mini takes the classes 0 to 49, and the lists have none of them" in refused(
        {**settings, "variant": "mini"}
    )


def test_any_data_set_of_files_takes_a_clean_list_as_its_meta_set(tmp_path):
    layout, settings = made(tmp_path, webvision, dataset="webvision")
    lines = []
    for number in range(3):
        layout.image(f"verified/{number}.jpg", "meta", number)
        lines.append(f"verified/{number}.jpg {number}")
    layout.text("verified.txt", lines)
    config = resolve(Config, **settings, meta_list="verified.txt")
    data = prepare(load_source(config), config, 0)
    assert [data.images.encoded(row) for row in data.meta_ids.tolist()] == [content for content, _ in layout.expected["meta"]]
    assert len(data.train_ids) == 6
    copied = layout.root / "verified/copy.jpg"
    copied.write_bytes((layout.root / "google/q0000/0.jpg").read_bytes())
    layout.text("verified.txt", [*lines, "verified/copy.jpg 0"])
    with pytest.raises(UserError, match="is also the training image"):
        prepare(load_source(config), config, 0)


def test_clothing1m_gets_a_long_tail(tmp_path):
    _, settings = made(tmp_path, clothing1m, dataset="clothing1m")
    config = resolve(Config, **settings, imbalance_factor=3)
    assert prepare(load_source(config), config, 0).true_class_counts().tolist() == [3, 1]


def test_shards_are_indexed_once(tmp_path, monkeypatch):
    from fastadvisor.datasets.readers import webdataset as reader

    layout, settings = made(tmp_path, webdataset, dataset="webdataset")
    first = load_source(resolve(Config, **settings))
    scanned = []
    real = reader._scan
    monkeypatch.setattr(reader, "_scan", lambda shard: scanned.append(shard.name) or real(shard))
    again = load_source(resolve(Config, **settings))
    assert not scanned
    assert torch.equal(first.train.labels, again.train.labels)
    assert again.train.images.name(0).endswith("train/000.tar:./sub.dir/0 é")
    os.utime(layout.root / "train/001.tar", ns=(1, 1))
    load_source(resolve(Config, **settings))
    assert scanned == ["001.tar"]


def _tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (
            lambda root: (root / "train/002.tar").write_bytes((root / "train/001.tar").read_bytes()[:3000]),
            "002.tar is cut short",
        ),
        (lambda root: (root / "train/002.tar").write_bytes(b"<html>" * 1000), "002.tar is damaged or no tar file"),
        (lambda root: (root / "train/002.tar.gz").write_bytes(b"x"), "002.tar.gz is compressed"),
        (lambda root: _tar(root / "train/002.tar", {"a.jpg": b"x"}), "the sample a lacks an image, or a label"),
        (lambda root: _tar(root / "train/002.tar", {"a.cls": b"1"}), "the sample a lacks an image, or a label"),
        (lambda root: _tar(root / "train/002.tar", {"a.jpg": b"x", "a.cls": b"one"}), "a.cls does not hold a class number"),
        *(
            (lambda root, m=members: _tar(root / "train/002.tar", {"a.jpg": b"x", **m}), "does not hold a class number")
            for members in (
                {"a.json": b"{"},
                {"a.json": b'{"label": Infinity}'},
                {"a.json": b'{"label": 3.7}'},
                {"a.json": b'{"label": null}'},
                {"a.json": b"[" * 100_000},
                {"a.cls": b"-1"},
                {"a.cls": b"1" + b"0" * 30},
            )
        ),
        (lambda root: _tar(root / "train/002.tar", {"readme.txt": b"x"}), "002.tar holds no images"),
    ],
)
def test_shards_that_cannot_be_used_are_named(tmp_path, break_it, sentence):
    layout, settings = made(tmp_path, webdataset, dataset="webdataset")
    break_it(layout.root)
    assert sentence in refused(settings)


def test_shards_by_the_names_of_the_hub_with_what_macos_and_masks_add(tmp_path):
    for part in ("train", "validation"):
        shard = tmp_path / f"imagenet1k-{part}-00.tar"
        _tar(
            shard,
            {"./._a.jpg": b"left by macOS", "a.mask.png": b"mask", "a.jpg": b"image", "a.seg.png": b"mask", "a.cls": b"0"},
        )
        (tmp_path / f"._{shard.name}").write_bytes(b"left by macOS")
    source = load_source(resolve(Config, dataset="webdataset", data_root=str(tmp_path)))
    assert [source.train.images.encoded(row) for row in range(len(source.train))] == [b"image"]
    assert source.test.labels.tolist() == [0]


def test_names_with_further_dots_are_samples_too(tmp_path):
    for part in ("train", "test"):
        _tar(
            tmp_path / f"{part}-0.tar",
            {"001.0.jpg": b"one", "001.0.cls": b"0", "002.5.jpg": b"two", "002.5.json": b'{"label": 1}'},
        )
    source = load_source(resolve(Config, dataset="webdataset", data_root=str(tmp_path)))
    assert [source.train.images.encoded(row) for row in range(2)] == [b"one", b"two"]
    assert source.train.labels.tolist() == [0, 1]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    layout, settings = made(tmp_path, webdataset, dataset="webdataset")
    (tmp_path / "no folder").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no folder"))
    assert load_source(resolve(Config, **settings)).train.labels.tolist() == [label for _, label in layout.expected["train"]]


def test_shards_written_by_the_webdataset_package_are_read(tmp_path):
    wds = pytest.importorskip("webdataset")
    contents = [encoded(photo(12, 10, seed=n)) for n in range(8)]
    for part in ("train", "test"):
        with wds.TarWriter(str(tmp_path / f"{part}-0.tar")) as sink:
            for number, content in enumerate(contents):
                sink.write({"__key__": f"sample{number:04}", "jpg": content, "cls": number % 2})
    source = load_source(resolve(Config, dataset="webdataset", data_root=str(tmp_path)))
    assert source.train.labels.tolist() == [0, 1] * 4
    assert [source.train.images.encoded(row) for row in range(8)] == contents
    assert (source.train.images.sizes(np.arange(8)) == [len(content) for content in contents]).all()
