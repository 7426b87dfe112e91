"""WebDataset's own rule for keys and extensions, held against the webdataset library."""

import io
import json
import tarfile

import pytest

from fastadvisor.config import Config, resolve
from fastadvisor.datasets import load_source
from fastadvisor.datasets.readers.webdataset import _split_member_name
from fastadvisor.errors import UserError
from tests.photos import encoded, photo


@pytest.fixture(autouse=True)
def no_cache_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tar(path, members):
    """Write (name, bytes) pairs, a name twice if it comes twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def load(root, members):
    for part in ("train", "test"):
        tar(root / f"{part}-0.tar", members)
    return load_source(resolve(Config, dataset="webdataset", data_root=str(root))).train


NAMES = [
    "a.jpg",
    "a.b.jpg",
    "scene000.1.JPG",
    "dir/a.jpg",
    "./dir.with.dots/a.seg.png",
    ".hidden",
    "no-extension",
    "dir.d/no-extension",
    "a..jpg",
    "é ü/ß.Jpeg",
    "a.tar.gz",
]


def test_keys_and_extensions_are_the_librarys():
    tariterators = pytest.importorskip("webdataset.tariterators")
    for name in NAMES:
        key, extension = tariterators.base_plus_ext(name)
        ours = _split_member_name(name)
        if key is None:
            assert ours[0] is None or ours[1] == ""  # no sample's, or of a kind that is passed over
        else:
            assert ours == (key, extension.lower())
    assert _split_member_name("x/.hidden.jpg")[0] is None  # the library: the sample x/


def test_samples_are_the_librarys(tmp_path):
    """Images, labels and order, with what else may lie in a shard."""
    wds = pytest.importorskip("webdataset")
    members = [("__meta__/index.json", b'{"label": 9}')]
    for number in range(6):
        members += [
            (f"d.1/s{number}.mask.png", b"mask"),
            (f"d.1/s{number}.jpg", encoded(photo(9, 9, seed=number))),
            (f"d.1/s{number}.txt", b"a caption"),
            (f"d.1/s{number}.cls", str(5 - number).encode()),
            (f"d.1/s{number}.json", json.dumps({"label": 5 - number}).encode()),
        ]
    split = load(tmp_path, members)
    theirs = list(wds.WebDataset(str(tmp_path / "train-0.tar"), shardshuffle=False).to_tuple("__key__", "jpg", "cls"))
    ours = [
        (split.images.name(row).split(":")[-1], split.images.encoded(row), str(int(split.labels[row])).encode())
        for row in range(6)
    ]
    assert ours == theirs


def test_dots_in_names_are_one_sample_and_refused(tmp_path):
    """180 images of 36 scenes: the library makes 36 samples of them, none of which has an image called jpg."""
    wds = pytest.importorskip("webdataset")
    members = []
    for scene in range(36):
        for view in range(5):
            stem = f"scene{scene:03}.{view}"
            members += [(f"{stem}.jpg", b"%d" % view), (f"{stem}.cls", b"%d" % (view % 2))]
    with pytest.raises(UserError) as error:
        load(tmp_path, members)
    assert "train-0.tar: the sample scene000 has several images, .0.jpg and .1.jpg: a key ends at the first dot" in str(
        error.value
    )
    theirs = list(wds.WebDataset(str(tmp_path / "train-0.tar"), shardshuffle=False))
    assert len(theirs) == 36
    assert set(theirs[0]) >= {"0.jpg", "1.jpg", "4.cls"}


@pytest.mark.parametrize(
    ("members", "says"),
    [
        (
            [("a.jpg", b"1"), ("a.cls", b"0"), ("b.jpg", b"2"), ("b.cls", b"0"), ("a.jpg", b"3"), ("a.cls", b"1")],
            "holds a.jpg twice, so the key a is two",
        ),
        ([("a.jpg", b"1"), ("a.cls", b"0"), ("a.cls", b"1")], "holds a.cls twice"),
        ([("a.jpg", b"1"), ("a.cls", b"0"), ("a.JPG", b"1")], "holds a.JPG twice"),
        ([("a.1.jpg", b"1"), ("a.2.cls", b"0")], "the sample a has the image .1.jpg and the label .2.cls: a key ends at"),
        (
            [("a.jpg", b"1"), ("a.png", b"1"), ("a.cls", b"0")],
            "the sample a has several images, .jpg and .png: keep one of them",
        ),
        ([("a.jpg", b"1"), ("a.1.cls", b"0"), ("a.2.cls", b"1")], "the sample a has several labels, .1.cls and .2.cls"),
        ([("a.jpg", b"1"), ("a.cls", b"0"), ("a.json", b'{"label": 1}')], "has labels in .cls and .json that differ"),
    ],
)
def test_a_sample_that_may_be_several_is_named(tmp_path, members, says):
    with pytest.raises(UserError) as error:
        load(tmp_path, members)
    assert says in str(error.value)


def test_a_key_of_its_own_for_each_image(tmp_path):
    split = load(
        tmp_path,
        [
            (f"scene{n // 5:03}-{n % 5}.{kind}", data)
            for n in range(180)
            for kind, data in (("jpg", b"%d" % n), ("cls", b"%d" % (n % 3)))
        ],
    )
    assert [split.images.encoded(row) for row in range(180)] == [b"%d" % n for n in range(180)]
    assert split.labels.tolist() == [n % 3 for n in range(180)]


def test_val_shards_beside_test_shards(tmp_path):
    for number, part in enumerate(("train", "test", "val")):
        tar(tmp_path / f"{part}-0.tar", [("a.jpg", part.encode()), ("a.cls", b"%d" % (number % 2))])
    source = load_source(resolve(Config, dataset="webdataset", data_root=str(tmp_path)))
    assert [part.images.encoded(0) for part in (source.train, source.test, source.val)] == [b"train", b"test", b"val"]


@pytest.mark.parametrize("name", ["train-val-000.tar", "pets-test-run-train-000.tar"])
def test_a_shard_of_two_parts_is_named(tmp_path, name):
    members = [("a.jpg", encoded(photo(12, 12), "JPEG")), ("a.cls", b"0")]
    for file in (name, "train-0.tar", "test-0.tar", "val-0.tar"):
        tar(tmp_path / file, members)
    with pytest.raises(UserError, match=f"The name of the shard .*{name} holds train and (val|test)"):
        load_source(resolve(Config, dataset="webdataset", data_root=str(tmp_path)))
