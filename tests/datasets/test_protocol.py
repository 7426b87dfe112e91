"""The order of the stages, their independence, and every refusal."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch

from fastadvisor.config import DataConfig
from fastadvisor.datasets import ArrayImages, FileImages, Source, Split, corruption, prepare, protocol
from fastadvisor.datasets.paths import PathTable
from fastadvisor.datasets.readers import cifar
from fastadvisor.errors import UserError

NO_MEAN = (0.0, 0.0, 0.0)


def numbered(start, count, side=2):
    """Return ``count`` distinct images whose first four bytes are their number."""
    images = np.zeros((count, side * side * 3), dtype=np.uint8)
    numbers = np.arange(start, start + count, dtype=np.uint32)
    images[:, :4] = numbers.view(np.uint8).reshape(-1, 4)
    return torch.from_numpy(images.reshape(count, side, side, 3))


def split(images, labels):
    return Split(ArrayImages(images), labels)


def balanced(classes=10, per_class=60, names=None, meta_per_class=0, **fields):
    count = classes * per_class
    labels = torch.arange(count) % classes
    if meta_per_class:
        fields["meta"] = split(numbered(2_000_000, classes * meta_per_class), torch.arange(classes * meta_per_class) % classes)
    return Source(
        name="fake",
        classes=names or [f"c{i}" for i in range(classes)],
        train=split(numbered(0, count), labels),
        test=split(numbered(1_000_000, classes), torch.arange(classes)),
        mean=NO_MEAN,
        std=(1.0, 1.0, 1.0),
        **fields,
    )


def same(one, two):
    return all(torch.equal(getattr(one, name), getattr(two, name)) for name in ("labels", "train_ids", "meta_ids"))


@pytest.mark.parametrize(
    ("classes", "per_class", "totals"),
    [
        (10, 100, {200: 10978, 100: 12156, 50: 13717, 20: 16683, 10: 20021, 1: 49000}),
        (10, 10, {200: 11177, 100: 12380, 50: 13967, 20: 16989, 10: 20391, 1: 49900}),
        (100, 10, {200: 9304, 100: 10626, 50: 12354, 20: 15594, 10: 19183, 1: 49000}),
    ],
)
def test_sizes_of_the_papers_tables(classes, per_class, totals):
    source = balanced(classes, 50_000 // classes)
    for factor, total in totals.items():
        data = prepare(source, DataConfig(imbalance_factor=factor, meta_per_class=per_class), 0)
        assert len(data.train_ids) == total
        assert torch.bincount(data.true_labels[data.meta_ids]).tolist() == [per_class] * classes
        if (classes, per_class, factor) == (10, 100, 200):
            assert data.true_class_counts().tolist() == [4900, 2719, 1509, 837, 465, 258, 143, 79, 44, 24]


def test_meta_and_train_are_disjoint_and_meta_is_clean():
    config = DataConfig(imbalance_factor=10, noise="flip", noise_rate=0.5)
    data = prepare(balanced(), config, 3)
    assert not set(data.train_ids.tolist()) & set(data.meta_ids.tolist())
    assert torch.equal(data.labels[data.meta_ids], data.true_labels[data.meta_ids])
    assert 0.3 < data.noise_rate() < 0.7
    assert torch.equal(data.true_labels, balanced().train.labels)


def test_the_meta_set_depends_on_the_seed_alone():
    source = balanced()
    plain = prepare(source, DataConfig(), 3)
    for config in (
        DataConfig(noise="flip", noise_rate=0.2),
        DataConfig(noise="uniform", noise_rate=0.8),
        DataConfig(imbalance_factor=20),
        DataConfig(imbalance_factor=5, noise="flip", noise_rate=0.4, noise_before_imbalance=True),
    ):
        assert torch.equal(prepare(source, config, 3).meta_ids, plain.meta_ids)
    assert not torch.equal(prepare(source, DataConfig(), 4).meta_ids, plain.meta_ids)


def test_the_tail_does_not_depend_on_the_noise():
    source = balanced()
    tails = [prepare(source, DataConfig(imbalance_factor=10, noise="flip", noise_rate=rate), 3) for rate in (0.1, 0.9)]
    assert torch.equal(tails[0].train_ids, tails[1].train_ids)


def test_seeds():
    config = DataConfig(imbalance_factor=10, noise="flip", noise_rate=0.4)
    one, again, other = (prepare(balanced(), config, seed) for seed in (7, 7, 8))
    assert same(one, again)
    for name in ("labels", "train_ids", "meta_ids"):
        assert not torch.equal(getattr(one, name), getattr(other, name))


def test_the_source_is_left_as_it_was():
    source = balanced()
    labels = source.train.labels.clone()
    prepare(source, DataConfig(noise="flip", noise_rate=1.0), 0)
    assert torch.equal(source.train.labels, labels)


def test_tail_by_the_true_label_then_noise_or_the_other_way_round():
    common = {"imbalance_factor": 10, "noise": "flip", "noise_rate": 0.3}
    after = prepare(balanced(per_class=500), DataConfig(**common), 0)
    assert after.true_class_counts().tolist() == [490, 379, 293, 227, 176, 136, 105, 81, 63, 49]
    before = prepare(balanced(per_class=500), DataConfig(**common, noise_before_imbalance=True), 0)
    given = torch.bincount(before.labels[before.train_ids], minlength=10).tolist()
    wanted = [490, 379, 293, 227, 176, 136, 105, 81, 63, 49]
    assert all(count <= want for count, want in zip(given, wanted, strict=True))
    assert given[2:] == wanted[2:]  # class 2's own 70 % are enough for its share of the tail
    assert before.true_class_counts().tolist() != given


def test_the_profile_of_the_tail_is_of_the_true_labels_whatever_the_noise():
    """After the noise hardly anything is called class 0, which cannot fill its place: the others keep theirs."""
    common = {"imbalance_factor": 10, "noise": "flip", "noise_rate": 0.9, "noise_before_imbalance": True}
    data = prepare(balanced(classes=4, per_class=500), DataConfig(**common, flip_map=(1, 2, 3, 3)), 0)
    given = torch.bincount(data.labels[data.train_ids], minlength=4).tolist()
    assert given[0] < 100
    assert given[1:] == [227, 105, 49]


def test_the_noise_has_a_stream_of_its_own():
    source = balanced()
    config = DataConfig(imbalance_factor=10, noise="flip", noise_rate=0.4)
    data = prepare(source, config, 3)
    targets = corruption.noise_targets("flip", source.classes)
    noisy = corruption.corrupt(source.train.labels.numpy(), targets, 0.4, np.random.default_rng([3, protocol.NOISE]))
    np.testing.assert_array_equal(data.labels[data.train_ids], noisy[data.train_ids])
    assert len({protocol.META, protocol.TAIL, protocol.NOISE}) == 3


def test_twins_among_files_lead_to_the_meta_set_of_the_same_images_in_memory(tmp_path):
    """Of files the twins are found after a first draw, of arrays before it: the second draw begins where the first did."""
    source = balanced(classes=3, per_class=12)
    pixels = source.train.images.pixels
    pixels[:18] = pixels[18:].clone()  # classes go round by threes: each image of the first half has a twin in its class
    pixels[24:36] = numbered(5000, 12)
    files = {}
    for part, images in (("train", pixels), ("test", source.test.images.pixels)):
        (tmp_path / part).mkdir()
        for number, image in enumerate(images):
            (tmp_path / part / f"{number:02}.png").write_bytes(image.numpy().tobytes())
        files[part] = FileImages(str(tmp_path / part), PathTable.of(f"{n:02}.png" for n in range(len(images))))
    on_disk = dataclasses.replace(
        source, train=Split(files["train"], source.train.labels), test=Split(files["test"], source.test.labels)
    )
    found = [prepare(kind, DataConfig(meta_per_class=3), 1) for kind in (source, on_disk)]
    assert same(*found)


def test_a_meta_set_is_drawn_from_the_data_sets_own():
    labels = torch.arange(3).repeat_interleave(8)
    drawn = []
    for seed in (0, 0, 1):
        source = balanced(classes=3, meta=split(numbered(2_000_000, 24), labels), meta_drawn=True)
        data = prepare(source, DataConfig(meta_per_class=2), seed)
        assert data.meta_ids.tolist() == list(range(180, 186))
        rows = [int(torch.nonzero((source.meta.images.pixels == p).flatten(1).all(1))) for p in data.images.pixels[180:]]
        assert data.labels[data.meta_ids].tolist() == labels[rows].tolist() == [0, 0, 1, 1, 2, 2]
        drawn.append(rows)
    assert drawn[0] == drawn[1] != drawn[2]


def test_no_meta_image_has_a_twin_in_training():
    source = balanced(classes=4, per_class=30)
    images = source.train.images.pixels
    images[4:84] = images[84:].repeat(3, 1, 1, 1)[:80]  # all but the first four and some have copies
    images[100:120] = numbered(5000, 20)
    data = prepare(source, DataConfig(meta_per_class=3), 1)
    meta = {image.numpy().tobytes() for image in data.images.pixels[data.meta_ids]}
    train = {image.numpy().tobytes() for image in data.images.pixels[data.train_ids]}
    assert not meta & train
    with pytest.raises(UserError, match=r"'c0' has only \d+ images without an identical copy.*--meta-per-class 20"):
        prepare(source, DataConfig(meta_per_class=20), 1)


def test_a_meta_set_of_its_own_is_appended_whole():
    data = prepare(balanced(meta_per_class=2), DataConfig(noise="flip", noise_rate=1.0, meta_per_class=7), 0)
    assert data.meta_ids.tolist() == list(range(600, 620))
    assert data.train_ids.tolist() == list(range(600))
    assert torch.equal(data.images.pixels[600:], numbered(2_000_000, 20))
    assert data.labels[600:].tolist() == [*range(10), *range(10)]
    assert data.noise_rate() == 1.0


def test_superclasses_reach_the_noise():
    names = list(cifar.CLASSES["cifar100"])
    source = balanced(100, 40, names=names, superclasses=cifar.superclasses(names))
    data = prepare(source, DataConfig(noise="hierarchical", noise_rate=1.0), 0)
    assert data.noise_rate() == 1.0


def test_a_noise_kind_at_rate_zero_is_fine():
    assert prepare(balanced(), DataConfig(noise="flip"), 0).noise_rate() == 0.0


def test_a_meta_image_among_the_training_images_is_refused_by_content():
    source = balanced(meta_per_class=2)
    source.meta.images.pixels[5] = source.train.images.pixels[17]
    with pytest.raises(UserError, match=r"meta image number 5 is also the training image number 17 \(1 of 20"):
        prepare(source, DataConfig(), 0)
    source.train.images.files = FileImages("train", PathTable.of(f"{i}.png" for i in range(600)))
    source.meta.images.files = FileImages("meta", PathTable.of(f"{i}.png" for i in range(20)))
    with pytest.raises(UserError, match=r"meta/5.png is also the training image train/17.png"):
        prepare(source, DataConfig(), 0)


def test_meta_images_in_the_test_set_are_warned_about():
    source = balanced()
    source.test = split(source.train.images.pixels[:300].clone(), source.train.labels[:300])
    with pytest.warns(UserWarning, match=r"of 100 meta images are test images too.*number \d+"):
        prepare(source, DataConfig(), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(balanced(), DataConfig(), 0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig(noise_rate=0.4), "--noise-rate is 0.4 and --noise is none.*--noise-rate 0"),
        (DataConfig(noise="flip", noise_rate=0.4, flip_map=(1, 2)), "2 entries, the data set 10 classes"),
        (DataConfig(noise="flip", noise_rate=0.4, flip_map=(10,) * 10), "sends class 0 to 10"),
        (DataConfig(noise="semantic", noise_rate=0.4), "--noise semantic"),
        (DataConfig(noise="hierarchical", noise_rate=0.4), "needs superclasses"),
        (DataConfig(meta_per_class=60), "'c0' has 60 training images and --meta-per-class 60 leaves none"),
        (DataConfig(imbalance_factor=60), "'c9' has no training images: lower --imbalance-factor"),
        (DataConfig(labels="x.npy", noise="flip"), "x.npy and --noise flip.*--noise none"),
    ],
)
def test_settings_that_do_not_suit_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        prepare(balanced(), config, 0)


def test_incomplete_sources_are_refused():
    source = balanced()
    source.train.labels[4] = 10
    with pytest.raises(UserError, match=r"training label at position 4 is 10.*10 classes"):
        prepare(source, DataConfig(), 0)
    source = balanced(meta_per_class=1)
    source.meta.labels[3] = 4
    with pytest.raises(UserError, match="'c3' has no meta images"):
        prepare(source, DataConfig(), 0)
    source = balanced(meta_per_class=1)
    source.train.labels[source.train.labels == 6] = 5
    with pytest.raises(UserError, match="'c6' has no training images"):
        prepare(source, DataConfig(), 0)


# ---- labels from a file ----


def write_labels(path, labels):
    if path.suffix == ".npy":
        np.save(path, labels)
    elif path.suffix == ".pt":
        torch.save(torch.from_numpy(labels), path)
    elif path.name.startswith("ids"):
        rows = [f"{i},{label}" for i, label in enumerate(labels)][::-1]
        path.write_text("\ufeffid,label\r\n" + "\r\n".join(rows) + "\r\n", encoding="utf-8")
    elif path.name.startswith("header"):
        path.write_text("\n".join(["label", *map(str, labels)]))
    else:
        path.write_text("\n".join(map(str, labels)) + "\n")


@pytest.mark.parametrize("name", ["l.npy", "l.pt", "l.txt", "l.csv", "header.csv", "ids.csv", "étiquettes 1.txt"])
def test_labels_from_a_file_replace_the_noise(tmp_path, name):
    labels = np.random.default_rng(0).integers(0, 10, 600)
    write_labels(tmp_path / name, labels)
    data = prepare(balanced(), DataConfig(labels=str(tmp_path / name), imbalance_factor=2), 0)
    np.testing.assert_array_equal(data.labels[data.train_ids], labels[data.train_ids])
    assert torch.equal(data.labels[data.meta_ids], balanced().train.labels[data.meta_ids])
    assert data.noise_rate() == pytest.approx(0.9, abs=0.05)


def text(content):
    return lambda path: path.write_text(content)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("l.npy", lambda path: np.save(path, np.zeros(7, int)), "7 labels for 600 training images"),
        ("l.npy", lambda path: np.save(path, np.full(600, 10)), r"label '10' at position 0 .*0 to 9"),
        ("l.npy", lambda path: np.save(path, np.array([0] * 5 + [-1] * 595)), r"label '-1' at position 5"),
        ("l.npy", lambda path: np.save(path, np.zeros(600)), "must be integers"),
        ("l.npy", lambda path: np.save(path, np.zeros((600, 1), int)), r"shape \(600, 1\)"),
        ("l.npy", lambda path: np.save(path, np.array([{}]), allow_pickle=True), "not a plain array"),
        ("l.npy", text(""), "not a plain array"),
        ("l.pt", lambda path: torch.save({"a": 1}, path), "integer tensor"),
        ("l.pt", text("junk"), "integer tensor"),
        ("l.txt", text("1\n2\nx\n" + 597 * "3\n"), "label 'x' at position 2 .*neither a class"),
        ("l.txt", text(600 * f"{'9' * 30}\n"), "nor a class number"),
        ("l.csv", text("1,2\n3,4\n"), "several columns and none called label.*path,label"),
        ("l.csv", text("id,label\n0\n"), "row 2: 1 columns"),
        ("l.csv", text("id,label\n0,1\n0,1\n"), "every sample number from 0 to 1 once"),
        ("l.csv", text(""), "0 labels for 600"),
        ("l.json", text("[]"), ".npy, .pt, .txt or .csv"),
        ("l.txt", lambda path: None, "There is no file of labels.*--labels"),
        ("l.txt", lambda path: path.write_bytes(b"\xff\xfe\x00"), "UTF-8"),
    ],
)
def test_unusable_label_files_are_refused(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(UserError, match=message):
        prepare(balanced(), DataConfig(labels=str(tmp_path / name)), 0)
