"""Small copies: made once, the same pixels, checked, made again where the originals have changed."""

import io
import itertools
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastadvisor.config import Config, resolve, to_dict
from fastadvisor.datasets import load_source, prepare
from fastadvisor.datasets.fingerprint import fingerprint
from fastadvisor.errors import UserError
from fastadvisor.loading import build_loaders, cache_images, resized_cache
from fastadvisor.loading.decode import Unreadable, decode_rgb, evaluation_pixels, read_encoded
from fastadvisor.loading.geometry import Geometry
from fastadvisor.loading.resized_cache import CopiedImages
from tests.photos import encoded, photo, write_photos

CPU = torch.device("cpu")


@pytest.fixture
def root(tmp_path):
    root = write_photos(tmp_path / "photos", count=6, size=(90, 60))
    (root / "train/ant/0.jpg").write_bytes(encoded(photo(30, 40), quality=90))  # small: copied as it is
    return root


def settings(root, tmp_path, **more):
    usual = {"image_size": 32, "batch_size": 4, "meta_per_class": 2, "meta_batch_size": 2, "workers": 1, "loader": "torch"}
    usual |= {"cache_size": 40, "cache_dir": str(tmp_path / "cache")}
    return resolve(Config, dataset="imagefolder", data_root=str(root), **{**usual, **more})


def staged(config):
    return cache_images(load_source(config), config, CPU)


def shards(tmp_path):
    return sorted((tmp_path / "cache/copies-40").glob("*.tar"))


def test_copies_have_the_shorter_side_asked_for_and_the_pixels_of_the_originals(root, tmp_path):
    config = settings(root, tmp_path)
    originals, source = load_source(config), staged(config)
    geometry = Geometry(32, 40, "random")
    for row in range(len(source.train)):
        data = source.train.images.encoded(row)
        if row == 0:
            assert data == originals.train.images.encoded(0)
            continue
        copy, original = decode_rgb(data), decode_rgb(originals.train.images.encoded(row))
        assert (min(copy.size), max(copy.size)) == (40, 60)
        pixels, wanted = (evaluation_pixels(image, geometry).astype(int) for image in (copy, original))
        assert np.abs(pixels - wanted).mean() < 6  # these photos are far more colourful than any, and JPEG halves colour
    assert source.train.images.name(3) == originals.train.images.name(3)
    with tarfile.open(shards(tmp_path)[0]) as tar:  # an ordinary tar file of ordinary images
        assert all(Image.open(io.BytesIO(tar.extractfile(member).read())).size for member in tar)


def test_copies_are_made_once(root, tmp_path, monkeypatch):
    config = settings(root, tmp_path)
    first = staged(config)
    assert len(shards(tmp_path)) == 2
    monkeypatch.setattr(resized_cache, "_copy", lambda *args: pytest.fail("made again"))
    again = staged(config)
    for row in range(len(first.train)):
        assert again.train.images.encoded(row) == first.train.images.encoded(row)


def test_a_shard_whose_images_have_changed_is_made_again_and_no_other(root, tmp_path, monkeypatch):
    monkeypatch.setattr(resized_cache, "SHARD", 5)
    config = settings(root, tmp_path)
    staged(config)
    before = {path: path.stat().st_mtime_ns for path in shards(tmp_path)}
    (root / "train/ant/2.jpg").write_bytes(encoded(photo(100, 70, seed=9), quality=90))
    images = staged(config).train.images
    after = shards(tmp_path)
    assert len(after) == len(before) + 1
    assert all(path.stat().st_mtime_ns == before[path] for path in after if path in before)
    assert decode_rgb(images.encoded(2)).size == (57, 40)


def test_an_interrupted_copy_goes_on_at_the_shard_it_was_at(root, tmp_path, monkeypatch):
    monkeypatch.setattr(resized_cache, "SHARD", 3)
    made = resized_cache._write_shard
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return made(*args)

    config = settings(root, tmp_path)
    monkeypatch.setattr(resized_cache, "_write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        staged(config)
    staged(config)
    assert len(calls) == 1 + len(shards(tmp_path))
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_a_cut_off_shard_is_made_again(root, tmp_path):
    config = settings(root, tmp_path)
    wanted = staged(config).train.images.encoded(4)
    for path in shards(tmp_path):
        path.write_bytes(path.read_bytes()[:2000])
    assert staged(config).train.images.encoded(4) == wanted


def test_a_damaged_copy_is_found_by_its_checksum(root, tmp_path):
    config = settings(root, tmp_path)
    images = staged(config).train.images
    assert isinstance(images, CopiedImages)
    shard = images.shards[int(images.shard[4])]
    content = bytearray(shard.read_bytes())
    content[int(images.offset[4]) + 100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(Unreadable, match=r"its copy is damaged: delete .*tar"):
        read_encoded(images, 4)
    read_encoded(images, 5)


def test_what_cannot_be_copied_is_counted_with_its_reason(root, tmp_path):
    (root / "train/ant/1.jpg").write_bytes(b"")
    (root / "train/bee/1.jpg").write_bytes((root / "train/bee/2.jpg").read_bytes()[:1500])
    config = settings(root, tmp_path, max_bad_fraction=0.3, meta_per_class=1)
    source = staged(config)
    with pytest.raises(UserError, match=r"Cannot read .*1.jpg"):
        build_loaders(resolve(Config, **{**to_dict(config), "max_bad_fraction": 0.0}), prepare(source, config, 0), CPU)
    assert source.train.images.reasons == {1: "empty file", 7: "cut short"}
    picked = source.train.images.select(np.array([7, 3, 1]))
    assert picked.reasons == {0: "cut short", 2: "empty file"}
    assert picked.encoded(1) == source.train.images.encoded(3)
    assert (picked.sizes(np.arange(3)) > 0).tolist() == [False, True, False]


@pytest.mark.parametrize("name", ["torch", "resident"])
def test_a_run_reads_the_copies(root, tmp_path, name):
    config = settings(root, tmp_path, loader=name)
    loaders = build_loaders(config, prepare(staged(config), config, 0), CPU)
    try:
        assert loaders.train.next_batch().images.shape == (4, 3, 32, 32)
        assert sum(len(batch.ids) for batch in loaders.test) == 12
    finally:
        loaders.close()


def test_copies_that_would_be_too_small_or_have_nowhere_to_go_are_refused(root, tmp_path):
    with pytest.raises(UserError, match="--cache-size 30 is under the 32 pixels"):
        staged(settings(root, tmp_path, cache_size=30))
    with pytest.raises(UserError, match="--cache-size is for data sets of image files"):
        staged(resolve(Config, cache_size=40))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --cache-dir"):
        staged(settings(root, tmp_path, cache_dir=str(tmp_path / "file")))


def test_without_a_folder_of_their_own_copies_go_to_the_users_cache(root, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    staged(settings(root, tmp_path, cache_dir=None))
    assert len(list((tmp_path / "home/fastadvisor/copies-40").glob("*.tar"))) == 2


def redraw(file, keep_time):
    """Put another picture there, of the same name and size in bytes."""
    times, size = file.stat(), file.stat().st_size
    out = io.BytesIO()
    Image.fromarray(255 - np.asarray(Image.open(file))).save(out, "BMP")
    assert len(out.getvalue()) == size
    file.write_bytes(out.getvalue())
    if keep_time:
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("keep_time", [False, True], ids=["new time", "old time"])
def test_another_picture_of_the_same_size_is_noticed(tmp_path, keep_time):
    """With an old time, as a program that copies times leaves it, where the shard's other pictures are drawn anew too."""
    root = tmp_path / "photos"
    for part, name, number in itertools.product(("train", "test"), ("ant", "bee"), range(6)):
        file = root / part / name / f"{number}.bmp"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(
            np.random.default_rng([number, ord(name[0]), ord(part[1])]).integers(0, 256, (60, 50, 3), dtype=np.uint8)
        ).save(file)
    config = settings(root, tmp_path)
    before = staged(config).train.images.encoded(3)
    changed = [root / "train/ant/3.bmp"] if not keep_time else sorted((root / "train").rglob("*.bmp"))
    for file in changed:
        redraw(file, keep_time)
    after = staged(config).train.images.encoded(3)
    assert after != before
    pixels, wanted = (np.asarray(decode_rgb(data)).astype(int) for data in (after, before))
    assert np.abs(255 - pixels - wanted).mean() < 3
    again = prepare(staged(config), config, 0)
    assert fingerprint(again) == fingerprint(prepare(staged(config), config, 0))


def test_the_fingerprint_of_a_run_notices_it_too(root):
    config = resolve(Config, dataset="imagefolder", data_root=str(root), meta_per_class=2)
    before = fingerprint(prepare(load_source(config), config, 0))
    file = root / "train/ant/2.jpg"
    data = bytearray(file.read_bytes())
    data[-40] ^= 1
    times = file.stat()
    file.write_bytes(bytes(data))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint(prepare(load_source(config), config, 0)) != before
