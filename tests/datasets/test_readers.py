"""Readers against tiny data sets in the true formats, written by the tests."""

import itertools
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from fastadvisor.config import Config, DataConfig
from fastadvisor.datasets import FileImages, load_source, prepare, protocol
from fastadvisor.datasets.duplicates import find_duplicates
from fastadvisor.datasets.paths import PathTable
from fastadvisor.datasets.readers import cifar
from fastadvisor.errors import UserError
from fastadvisor.loading import decode, decode_into_memory, memory
from fastadvisor.loading.geometry import Geometry
from fastadvisor.loading.unreadable import BadImages
from tests.photos import write_photos

# The published fine-to-coarse map of CIFAR-100, by fine label.
COARSE = [
    *(4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7),
    *(6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10),
    *(16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16),
    *(12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13),
]


def picture(path, size=(12, 10), seed=0, mode="RGB"):
    """Write noise of ``size`` (width, height) and return it as an array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def folders(root, splits=("train", "test"), classes=("a", "b"), per_class=3, size=(12, 10), suffix=".png"):
    for number, split in enumerate(splits):
        for label, name in enumerate(classes):
            for i in range(per_class):
                picture(root / split / name / f"{i}{suffix}", size, seed=100_000 * number + 1000 * label + i)
    return root


def read(root, **settings):
    """Read and decode, as a run with the resident loader does."""
    config = Config(dataset="imagefolder", data_root=str(root), **settings)
    source = decode_into_memory(load_source(config), config, torch.device("cpu"))
    for part, split in (("training", source.train), ("test", source.test)):
        BadImages(part, split.images, len(split), config.max_bad_fraction).add(split.images.bad)
    return source


def decoded(root, names, side):
    images = FileImages(root, PathTable.of(names))
    return decode.decode_all(images, np.arange(len(names)), Geometry(side, side, "pad"))[0]


# ---- digits ----


def test_digits():
    source = load_source(DataConfig())
    images = source.train.images.pixels
    assert images.shape == (1300, 8, 8, 3)
    assert source.test.images.pixels.shape == (497, 8, 8, 3)
    assert images.dtype == torch.uint8
    assert images.max() == 255
    assert torch.equal(images[..., 0], images[..., 2])
    assert source.train.labels.dtype == source.test.labels.dtype == torch.int64
    scaled = images.double() / 255
    assert scaled.mean().item() == pytest.approx(source.mean[0], abs=1e-6)
    assert scaled.std(correction=0).item() == pytest.approx(source.std[0], abs=1e-6)
    assert torch.equal(load_source(DataConfig()).train.images.pixels, images)
    data = prepare(source, DataConfig(), 0)
    assert (len(data.train_ids), len(data.meta_ids)) == (1200, 100)


# ---- CIFAR ----


def test_superclasses_are_the_published_ones():
    names = cifar.CLASSES["cifar100"]
    groups = cifar.superclasses(list(names))
    assert len(groups) == 20
    assert {len(group) for group in groups} == {5}
    assert sorted(label for group in groups for label in group) == list(range(100))
    assert len(set(names)) == 100
    assert {label: number for number, group in enumerate(groups) for label in group} == dict(enumerate(COARSE))


def write_cifar(root, name):
    """Write a CIFAR of 2 images a file in the true format, its integers and bytes those of the published files."""
    random = np.random.default_rng(0)
    folder = root / cifar.ARCHIVES[name]
    folder.mkdir(parents=True)
    train = [f"data_batch_{i}" for i in range(1, 6)] if name == "cifar10" else ["train"]
    written = {}
    for file in [*train, "test_batch" if name == "cifar10" else "test"]:
        data = random.integers(0, 256, (2, 3072), dtype=np.uint8)
        labels = random.integers(0, 10, 2).tolist()
        entry = {"data": data, "labels" if name == "cifar10" else "fine_labels": labels}
        (folder / file).write_bytes(pickle.dumps(entry, protocol=2))
        written[file] = (data, labels)
    meta = {"label_names" if name == "cifar10" else "fine_label_names": list(cifar.CLASSES[name])}
    (folder / ("batches.meta" if name == "cifar10" else "meta")).write_bytes(pickle.dumps(meta, protocol=2))
    return written


@pytest.fixture
def unchecked(monkeypatch):
    """Torchvision checks MD5 sums, which only the published files pass."""
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda path, md5=None: True)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("inside", [False, True])
def test_cifar_pickles(tmp_path, name, inside):
    written = write_cifar(tmp_path, name)
    root = tmp_path / cifar.ARCHIVES[name] if inside else tmp_path
    source = load_source(DataConfig(dataset=name, data_root=str(root)))
    *train, test = written.values()
    data = np.concatenate([part[0] for part in train]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(source.train.images.pixels.numpy(), data)
    assert source.train.labels.tolist() == [label for part in train for label in part[1]]
    assert source.test.labels.tolist() == test[1]
    assert source.classes == list(cifar.CLASSES[name])
    assert (source.superclasses is None) == (name == "cifar10")
    assert source.mean[0] == pytest.approx(125.3 / 255)


def test_a_damaged_cifar_is_named(tmp_path):
    write_cifar(tmp_path, "cifar10")
    with pytest.raises(UserError, match=r"incomplete or damaged.*cifar-10-batches-py.*--download"):
        load_source(DataConfig(dataset="cifar10", data_root=str(tmp_path)))


def test_a_cifar_that_is_not_there_says_how_to_get_it(tmp_path):
    for root in (None, str(tmp_path), str(tmp_path / "absent")):
        with pytest.raises(UserError, match=r"cifar-100-python.*--download"):
            load_source(DataConfig(dataset="cifar100", data_root=root))


def test_a_failed_download_is_a_sentence(tmp_path, monkeypatch):
    def fail(self):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.CIFAR10, "download", fail)
    with pytest.raises(UserError, match=r"could not be downloaded.*no route to host"):
        load_source(DataConfig(dataset="cifar10", data_root=str(tmp_path), download=True))


def test_cifar_as_folders(tmp_path):
    folders(tmp_path, classes=cifar.CIFAR10, per_class=1, size=(32, 32))
    source = load_source(DataConfig(dataset="cifar10", data_root=str(tmp_path)))
    assert source.image_size == 32
    assert source.train.labels.tolist() == list(range(10))
    assert source.mean == cifar.MEAN
    assert source.train.images.name(0).endswith("train/airplane/0.png")


def test_folders_that_are_not_cifar_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"'cat' where 'automobile' belongs.*imagefolder"):
        load_source(DataConfig(dataset="cifar10", data_root=str(folders(tmp_path / "x", classes=("airplane", "cat")))))
    with pytest.raises(UserError, match="holds 2 classes, cifar10 has 10"):
        load_source(DataConfig(dataset="cifar10", data_root=str(folders(tmp_path / "y", classes=("airplane", "automobile")))))


# ---- imagefolder ----


def test_images_of_one_size_keep_their_bytes(tmp_path):
    folders(tmp_path, classes=("große Äpfel", "red pears"), size=(9, 9))
    pixels = picture(tmp_path / "train" / "red pears" / "ünï 1.PNG", (9, 9), seed=9)
    source = read(tmp_path)
    assert source.classes == ["große Äpfel", "red pears"]
    assert source.train.images.pixels.shape == (7, 9, 9, 3)
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    np.testing.assert_array_equal(source.train.images.pixels[6], pixels)
    assert source.train.images.name(6).endswith("ünï 1.PNG")
    assert source.meta is None
    assert source.mean == (0.485, 0.456, 0.406)


def test_other_files_hidden_files_and_val_are_understood(tmp_path):
    folders(tmp_path, splits=("train", "val", "meta"), suffix=".jpg")
    (tmp_path / "train" / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "a" / "._0.jpg").write_text("left by macOS")
    (tmp_path / "train" / ".cache").mkdir()
    source = read(tmp_path)
    assert len(source.train) == len(source.test) == len(source.meta) == 6
    assert source.meta.images.name(0).endswith("meta/a/0.jpg")
    data = prepare(source, DataConfig(), 0)
    assert data.meta_ids.tolist() == list(range(6, 12))


def test_size_is_the_median_shorter_side_or_the_users(tmp_path):
    folders(tmp_path, size=(12, 10))
    picture(tmp_path / "train" / "a" / "big.jpg", (50, 40))
    assert read(tmp_path).train.images.pixels.shape == (7, 10, 10, 3)
    assert read(tmp_path, image_size=6).train.images.pixels.shape == (7, 6, 6, 3)


def test_large_images_are_capped(tmp_path):
    picture(tmp_path / "x.png", (300, 260))
    assert decode.choose_side(FileImages(tmp_path, PathTable.of(["x.png"]))) == 224


def test_center_crop(tmp_path):
    pixels = picture(tmp_path / "x.png", (14, 10))
    np.testing.assert_array_equal(decoded(tmp_path, ["x.png"], 10)[0], pixels[:, 2:12])


def test_exif_rotation_is_undone(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: turn clockwise by 90 degrees to view
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(decoded(tmp_path, ["x.png"], 8)[0], np.rot90(pixels, -1))


def test_gray_palette_alpha_and_sixteen_bits_become_rgb(tmp_path):
    gray = picture(tmp_path / "gray.png", (8, 8), mode="L")
    Image.fromarray(gray.astype(np.uint16) * 256).save(tmp_path / "deep.png")
    Image.fromarray(gray).convert("RGBA").save(tmp_path / "alpha.png")
    Image.fromarray(gray).convert("P").save(tmp_path / "palette.png", transparency=b"\x00\xff")
    out = decoded(tmp_path, ["gray.png", "deep.png", "alpha.png", "palette.png"], 8)
    for image in out[:3]:
        np.testing.assert_array_equal(image, np.repeat(gray[..., None], 3, axis=2))


def test_broken_images_are_named_and_counted(tmp_path):
    folders(tmp_path, per_class=8)
    victim = tmp_path / "train" / "a" / "3.png"
    victim.write_bytes(victim.read_bytes()[:200])
    (tmp_path / "train" / "b" / "1.png").write_bytes(b"")
    (tmp_path / "train" / "b" / "2.png").write_text("<html>")
    with pytest.raises(UserError, match=r"a/3.png and 2 more \(3 of 16 training files; the first: cut short"):
        read(tmp_path)
    for path in (tmp_path / "train").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"16 of 16"):
        read(tmp_path)


def test_what_does_not_fit_in_memory_is_refused_before_decoding(tmp_path, monkeypatch):
    folders(tmp_path)
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"100000 x 100000 need 360.0 GB.*0.0 GB are free.*--image-size"):
        read(tmp_path, image_size=100_000, loader="resident")


def test_available_memory_is_told():
    assert decode.available_memory() is None or decode.available_memory() > 1e6


def test_layouts_that_are_wrong_are_explained(tmp_path):
    with pytest.raises(UserError, match="needs --data-root"):
        load_source(DataConfig(dataset="imagefolder"))
    with pytest.raises(UserError, match="There is no folder"):
        read(tmp_path / "absent")
    with pytest.raises(UserError, match="no folder train/"):
        read(tmp_path)
    folders(tmp_path, splits=("train",))
    with pytest.raises(UserError, match=r"no folder test/ \(or val/\)"):
        read(tmp_path)
    folders(tmp_path, splits=("test",), classes=("a",))
    with pytest.raises(UserError, match="test has no folder for the class 'b'"):
        read(tmp_path)
    folders(tmp_path, splits=("test",), classes=("b", "c"))
    with pytest.raises(UserError, match="test/c is a class that train/ does not have"):
        read(tmp_path)


def test_empty_class_folders_are_named(tmp_path):
    folders(tmp_path)
    (tmp_path / "train" / "c").mkdir()
    (tmp_path / "test" / "c").mkdir()
    with pytest.raises(UserError, match="train/c holds no images"):
        read(tmp_path)
    (tmp_path / "bare" / "train").mkdir(parents=True)
    (tmp_path / "bare" / "test").mkdir()
    with pytest.raises(UserError, match="no class folders"):
        read(tmp_path / "bare")


def test_an_unknown_data_set_is_named():
    config = DataConfig()
    config.dataset = "digit"
    with pytest.raises(UserError, match=r"No data set 'digit'\. Did you mean 'digits'"):
        load_source(config)


def test_a_meta_set_is_drawn_from_a_set_full_of_copies_in_a_few_rounds(tmp_path, monkeypatch):
    root = write_photos(tmp_path, count=30, size=(12, 9))
    for name, number in itertools.product(("ant", "bee"), range(24)):
        shutil.copy(root / f"train/{name}/{number}.jpg", root / f"train/{name}/again{number}.jpg")
    rounds = []
    monkeypatch.setattr(protocol, "find_duplicates", lambda *args: rounds.append(args) or find_duplicates(*args))
    config = DataConfig(dataset="imagefolder", data_root=str(root), meta_per_class=6)
    data = prepare(load_source(config), config, 0)
    assert len(rounds) <= 5  # one of them is the comparison with the test images
    names = {Path(data.images.name(row)).stem for row in data.meta_ids.tolist()}
    assert names == {str(number) for number in range(24, 30)}
