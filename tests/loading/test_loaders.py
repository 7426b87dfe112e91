"""The loaders against each other: the same ids, labels and pixels, epochs, resumption, and files that cannot be read."""

import gc
import os

import numpy as np
import pytest
import torch
from PIL import Image

from fastadvisor.config import Config, resolve
from fastadvisor.datasets import ArrayImages, load_source, prepare
from fastadvisor.errors import UserError
from fastadvisor.loading import build_loaders, decode_into_memory
from fastadvisor.loading.backends import dali
from fastadvisor.loading.backends.dali_pipeline import Work
from fastadvisor.loading.choose import choose_loader
from tests.photos import encoded, photo, write_photos

CPU = torch.device("cpu")
needs_dali = pytest.mark.skipif(not dali.available(), reason="NVIDIA DALI is not installed")
STREAMING = ["torch", pytest.param("dali", marks=needs_dali)]
GREY_LEVEL = 1 / (255 * 0.224)
"""Of normalised pixels."""


def alike(one, two):
    """JPEG tolerance: decoders and resizers round to whole grey levels, a few times in a row and in different orders."""
    difference = (one - two).abs() / GREY_LEVEL
    return difference.max() < 4 and difference.mean() < 0.5


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), splits=("train", "test", "meta"))


@pytest.fixture
def opened():
    """Build loaders and close them in the end."""
    built = []

    def open_loaders(root, loader, rank=0, ranks=1, **settings):
        usual = {"image_size": 24, "batch_size": 4, "meta_batch_size": 3, "eval_batch_size": 5, "workers": 1, "loader": loader}
        config = resolve(Config, dataset="imagefolder", data_root=str(root), **{**usual, **settings})
        data = prepare(decode_into_memory(load_source(config), config, CPU), config, config.seed)
        built.append(build_loaders(config, data, CPU, rank, ranks))
        return built[-1]

    yield open_loaders
    for loaders in built:
        loaders.close()


def take(loader, count):
    return [loader.next_batch() for _ in range(count)]


def test_loaders_deliver_the_same_test_images(photos, opened):
    wanted = list(opened(photos, "resident", resize_size=28).test)
    assert [len(batch.ids) for batch in wanted] == [5, 5, 5, 1]
    for name in ("torch", *(["dali"] if dali.available() else [])):
        got = list(opened(photos, name, resize_size=28).test)
        for one, two in zip(got, wanted, strict=True):
            assert one.images.dtype == torch.float32
            assert one.images.is_contiguous()
            assert torch.equal(one.ids, two.ids)
            assert torch.equal(one.labels, two.labels)
            assert alike(one.images, two.images)


@needs_dali
@pytest.mark.parametrize("crop", ["pad", "random", "resized"])
def test_torch_and_dali_deliver_the_same_training_images(photos, opened, crop):
    one, two = (opened(photos, name, crop=crop, meta_batch_size=4) for name in ("torch", "dali"))
    for part in ("train", "meta"):
        for a, b in zip(take(getattr(one, part), 5), take(getattr(two, part), 5), strict=True):
            assert torch.equal(a.ids, b.ids)
            assert torch.equal(a.labels, b.labels)
            assert a.images.shape == b.images.shape == (4, 3, 24, 24)
            assert alike(a.images, b.images)


@needs_dali
@pytest.mark.parametrize("crop", ["pad", "random", "resized"])
def test_what_dali_does_on_a_gpu_gives_the_same_images_on_the_cpu(photos, opened, crop, monkeypatch):
    """There DALI resizes, mirrors and normalises as well."""
    wanted = opened(photos, "dali", crop=crop)
    batches = {part: take(getattr(wanted, part), 5) for part in ("train", "meta")} | {"test": list(wanted.test)}
    monkeypatch.setattr(Work, "only_decoded", False)
    got = opened(photos, "dali", crop=crop)
    for part, expected in batches.items():
        for a, b in zip(expected, list(got.test) if part == "test" else take(getattr(got, part), 5), strict=True):
            assert torch.equal(a.ids, b.ids)
            assert b.images.dtype == torch.float32
            assert alike(a.images, b.images)


@pytest.mark.parametrize("name", STREAMING)
def test_the_labels_are_those_of_the_table_and_noise_rewrites_no_list(photos, opened, name):
    loaders = opened(photos, name, noise="flip", noise_rate=1.0, crop="random")
    for batch in take(loaders.train, 4):
        assert torch.equal(batch.labels, loaders.data.labels[batch.ids])
        assert (batch.labels != loaders.data.true_labels[batch.ids]).all()
    meta = loaders.meta.next_batch()
    assert torch.equal(meta.labels, loaders.data.true_labels[meta.ids])
    assert set(meta.ids.tolist()) <= set(loaders.data.meta_ids.tolist())


@pytest.mark.parametrize("name", [*STREAMING, "synthetic"])
def test_an_epoch_sees_every_id_once(photos, opened, name):
    loaders = opened(photos, name, crop="resized")
    assert len(loaders.train) == 4
    for _ in range(3):
        seen = torch.cat([batch.ids for batch in take(loaders.train, 4)])
        assert sorted(seen.tolist()) == list(range(16))
    epochs = [torch.cat([batch.ids for batch in take(loaders.meta, 5)]).tolist() for _ in range(2)]
    assert sorted(epochs[0]) == sorted(set(epochs[0]))  # 15 of 16: the last partial batch is dropped
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(
    ("name", "crop"),
    [
        ("resident", "pad"),
        ("torch", "pad"),
        ("torch", "resized"),
        pytest.param("dali", "pad", marks=needs_dali),
        pytest.param("dali", "resized", marks=needs_dali),
    ],
)
def test_ranks_share_an_epoch_and_see_together_what_one_would(photos, opened, name, crop):
    policy = "none" if (name, crop) == ("dali", "resized") else "cifar10"  # DALI's own draws are each rank's
    settings = {"meta_batch_size": 4, "cutout": 3, "crop": crop, "auto_augment": policy}
    whole = opened(photos, name, **settings)
    parts = [opened(photos, name, rank, 2, **settings) for rank in range(2)]
    for part in ("train", "meta"):
        assert len(getattr(parts[0], part)) == len(getattr(whole, part)) == 4
        for _ in range(2):  # epochs
            seen = [take(getattr(loaders, part), 4) for loaders in (whole, *parts)]
            for one, first, second in zip(*seen, strict=True):
                assert torch.equal(one.ids, torch.cat([first.ids, second.ids]))
                assert torch.equal(one.images, torch.cat([first.images, second.images]))
                assert torch.equal(one.labels, torch.cat([first.labels, second.labels]))
            ids = [torch.cat([batch.ids for batch in batches]).tolist() for batches in seen[1:]]
            assert not set(ids[0]) & set(ids[1])
            assert len(set(ids[0] + ids[1])) == 16


@needs_dali
def test_dali_draws_for_each_rank_alone_and_anew_for_another_number_of_them(photos, opened):
    settings = {"crop": "random", "meta_batch_size": 4}
    augmented = [opened(photos, "dali", rank, 2, auto_augment="cifar10", **settings).train for rank in range(2)]
    plain = [opened(photos, "dali", rank, 2, **settings).train for rank in range(2)]
    before = opened(photos, "dali", auto_augment="cifar10", **settings).train
    take(before, 3)

    def changes():
        pairs = [zip(take(one, 8), take(two, 8), strict=True) for one, two in zip(augmented, plain, strict=True)]
        return [torch.cat([(one.images - two.images).abs().amax(dim=(1, 2, 3)) > 0.2 for one, two in each]) for each in pairs]

    first, second = changes()
    assert not torch.equal(first, second)
    for one, two in zip(augmented, plain, strict=True):
        one.load_state_dict(before.state_dict())
        two.load_state_dict({**two.state_dict(), "index": 3})
    first, second = changes()
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ["resident", *STREAMING])
def test_ranks_share_the_test_images_and_none_is_seen_twice(photos, opened, name):
    parts = [list(opened(photos, name, rank, 3, batch_size=6).test) for rank in range(3)]
    assert [sum(len(batch.ids) for batch in part) for part in parts] == [6, 5, 5]
    ids = torch.cat([batch.ids for part in parts for batch in part])
    assert sorted(ids.tolist()) == list(range(16))


@pytest.mark.parametrize(
    ("ranks", "settings", "says"),
    [
        (2, {"batch_size": 5}, "--batch-size 5 cannot be shared evenly by 2 processes: make it a multiple of 2"),
        (1, {"batch_size": 5, "accumulate": 3}, "--batch-size 5 cannot be shared evenly by 3 micro-batches: make it a mul"),
        (
            2,
            {"batch_size": 8, "accumulate": 2},
            "--meta-batch-size 3 .* by 2 processes of 2 micro-batches: make it a multiple of 4",
        ),
    ],
)
def test_batches_that_cannot_be_shared(photos, opened, ranks, settings, says):
    with pytest.raises(UserError, match=says):
        opened(photos, "resident", 0, ranks, **settings)
    assert opened(photos, "resident", 0, 2, batch_size=6, meta_batch_size=None).meta.batch_size == 3


@pytest.mark.parametrize("name", STREAMING)
@pytest.mark.parametrize("extra", [{}, {"crop": "resized", "cutout": 6}, {"crop": "random", "auto_augment": "imagenet"}])
def test_a_saved_stream_continues_exactly_in_the_middle_of_an_epoch(photos, opened, tmp_path, name, extra):
    stream = opened(photos, name, **extra).train
    take(stream, 3)
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    wanted = take(stream, 7)
    resumed = opened(photos, name, **extra).train
    take(resumed, 1)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for one, two in zip(wanted, take(resumed, 7), strict=True):
        assert torch.equal(one.ids, two.ids)
        assert torch.equal(one.images, two.images)


@pytest.mark.parametrize("name", STREAMING)
def test_auto_augment_changes_images_and_not_their_order(photos, opened, name):
    plain, augmented = (opened(photos, name, crop="random", auto_augment=policy) for policy in ("none", "cifar10"))
    pairs = list(zip(take(plain.train, 8), take(augmented.train, 8), strict=True))
    assert all(torch.equal(one.ids, two.ids) for one, two in pairs)
    changed = torch.cat([(one.images - two.images).abs().amax(dim=(1, 2, 3)) > 0.2 for one, two in pairs])
    assert 0.4 < changed.float().mean() < 1


@pytest.mark.parametrize("name", STREAMING)
def test_a_batch_is_never_written_again(photos, opened, name):
    loaders = opened(photos, name, crop="random")
    batches = take(loaders.train, 3)
    copies = [batch.images.clone() for batch in batches]
    take(loaders.train, 12)
    for batch, copy in zip(batches, copies, strict=True):
        assert torch.equal(batch.images, copy)


@pytest.mark.parametrize("name", STREAMING)
def test_several_passes_over_the_test_images_while_training_goes_on(photos, opened, name):
    loaders = opened(photos, name, crop="random")
    passes = []
    for _ in range(3):
        take(loaders.train, 2)
        passes.append(torch.cat([batch.images for batch in loaders.test]))
    assert len(passes[0]) == 16
    assert torch.equal(passes[0], passes[1])
    assert torch.equal(passes[0], passes[2])


def test_the_torch_loader_gives_the_same_with_and_without_processes(photos, opened):
    for extra in ({"crop": "resized", "auto_augment": "cifar10"}, {}):
        streams = [opened(photos, "torch", workers=workers, **extra).train for workers in (0, 1, 2)]
        state = torch.get_rng_state()
        for batches in zip(*(take(stream, 5) for stream in streams), strict=True):
            assert all(torch.equal(batch.images, batches[0].images) for batch in batches)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", STREAMING)
def test_images_in_memory_can_be_streamed_too(opened, name):
    config = resolve(Config, dataset="digits", loader=name, workers=1, batch_size=50)
    data = prepare(load_source(config), config, 0)
    loaders = build_loaders(config, data, CPU)
    try:
        assert isinstance(data.images, ArrayImages)
        resident = build_loaders(resolve(Config, dataset="digits"), data, CPU)
        got, wanted = (torch.cat([batch.images for batch in one.test]) for one in (loaders, resident))
        assert torch.allclose(got, wanted, atol=1e-5)
        assert loaders.train.next_batch().images.shape == (50, 3, 8, 8)
    finally:
        loaders.close()


def test_synthetic_images_are_the_same_again_and_again(photos, opened):
    loaders = opened(photos, "synthetic", crop="random", cutout=4)
    first, second = take(loaders.train, 2)
    assert torch.equal(first.images, second.images)
    assert first.images.shape == (4, 3, 24, 24)
    assert not torch.equal(first.ids, second.ids)
    assert len(torch.cat([batch.ids for batch in loaders.test])) == 16


def test_waiting_is_counted(photos, opened):
    loaders = opened(photos, "torch")
    assert loaders.train.waited == 0
    take(loaders.train, 2)
    assert loaders.train.waited > 0


# ---- files that cannot be read ----


def damage(root):
    """Spoil files of ROOT/train/ant, one each way, and return which ids they have."""
    ant = root / "train" / "ant"
    whole = (ant / "1.jpg").read_bytes()
    (ant / "0.jpg").write_bytes(whole[: len(whole) // 2])
    (ant / "2.jpg").write_bytes(b"<html>not found</html>")
    return {0: "cut short", 2: "not an image"}


@pytest.mark.parametrize("name", STREAMING)
@pytest.mark.parametrize("crop", ["pad", "resized"])
def test_bad_files_are_left_out_counted_and_replaced(tmp_path, opened, name, crop):
    write_photos(tmp_path, splits=("train", "test", "meta"))
    reasons = damage(tmp_path)
    (tmp_path / "test" / "bee" / "3.jpg").write_bytes(b"\x00")
    loaders = opened(tmp_path, name, crop=crop, max_bad_fraction=0.2)
    for _ in range(2):
        seen = torch.cat([batch.ids for batch in take(loaders.train, 4)]).tolist()
        assert len(seen) == 16
        assert set(seen) == set(range(16)) - set(reasons)
    assert loaders.bad[0].reasons == reasons
    tested = torch.cat([batch.ids for batch in loaders.test]).tolist()
    assert tested == [row for row in range(16) if row != 11]
    assert loaders.bad[2].reasons == {11: "not an image"}
    assert loaders.bad_count() == 3
    lines = loaders.bad_table().splitlines()
    assert lines[0] == "part,id,reason,image"
    assert lines[1] == f"training,0,cut short,{tmp_path / 'train/ant/0.jpg'}"
    assert lines[3].startswith("test,11,not an image,")


@needs_dali
def test_stand_ins_do_not_depend_on_the_loader_or_on_what_was_read_before(tmp_path, opened):
    write_photos(tmp_path, splits=("train", "test", "meta"))
    damage(tmp_path)
    settings = {"crop": "random", "max_bad_fraction": 0.2}
    one, two = (opened(tmp_path, name, **settings).train for name in ("torch", "dali"))
    first = take(one, 9)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(first, take(two, 9), strict=True))
    resumed = opened(tmp_path, "torch", **settings).train
    state = one.state_dict()
    state["index"] = 5
    resumed.load_state_dict(state)
    assert torch.equal(resumed.next_batch().ids, first[5].ids)
    assert set(resumed.bad.reasons) == {0, 2}


@pytest.mark.parametrize("name", STREAMING)
def test_too_many_bad_files_stop_the_run(tmp_path, opened, name):
    write_photos(tmp_path, splits=("train", "test", "meta"))
    damage(tmp_path)
    loaders = opened(tmp_path, name, crop="random", max_bad_fraction=0.1)
    with pytest.raises(UserError, match=r"train/ant/[02].jpg and 1 more \(2 of 16 training files; .*--max-bad-fraction"):
        take(loaders.train, 8)
    (tmp_path / "test" / "ant" / "0.jpg").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=r"test/ant/0.jpg \(1 of 16 test files; the first: not an image\)"):
        list(opened(tmp_path, name, max_bad_fraction=0.05, crop="random").test)


@pytest.mark.parametrize("name", STREAMING)
def test_missing_and_empty_files_are_found_before_any_work_is_lost(tmp_path, opened, name):
    write_photos(tmp_path, splits=("train", "test", "meta"))
    (tmp_path / "train" / "ant" / "0.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"train/ant/0.jpg \(1 of 16 training files; the first: empty file\)"):
        opened(tmp_path, name, crop="random")


@pytest.mark.parametrize("name", STREAMING)
def test_a_file_that_vanishes_while_the_run_goes_on(tmp_path, opened, name):
    write_photos(tmp_path, splits=("train", "test", "meta"))
    loaders = opened(tmp_path, name, crop="random", max_bad_fraction=0.2)
    take(loaders.train, 1)
    (tmp_path / "train" / "bee" / "5.jpg").unlink()
    for _ in range(6):
        take(loaders.train, 4)
    assert loaders.bad[0].reasons == {13: "No such file or directory"}


@pytest.mark.parametrize("name", STREAMING)
def test_a_test_batch_of_which_nothing_can_be_read(tmp_path, opened, name):
    write_photos(tmp_path, splits=("train", "test", "meta"))
    for row in range(3):
        (tmp_path / "test" / "ant" / f"{row}.jpg").write_bytes(b"x")
        (tmp_path / "test" / "bee" / f"{row + 5}.jpg").write_bytes(b"x")
    loaders = opened(tmp_path, name, crop="random", max_bad_fraction=0.5, eval_batch_size=3)
    for _ in range(2):
        seen = torch.cat([batch.ids for batch in loaders.test]).tolist()
        assert seen == [*range(3, 13)]
        assert loaders.bad[2].reasons.keys() == {0, 1, 2, 13, 14, 15}


def odd_images():
    """Images whose name lies, and what Pillow makes of them."""
    image = photo(40, 30, seed=3)
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = (np.asarray(image.convert("L")).astype(np.uint16)) * 257
    return {
        "png.jpg": encoded(image, "PNG"),
        "cmyk.jpg": encoded(image.convert("CMYK")),
        "gray.jpg": encoded(image.convert("L")),
        "deep.jpg": encoded(Image.fromarray(deep), "PNG"),
        "turned.jpg": encoded(image, exif=turned),
        "progressive.jpg": encoded(image, progressive=True),
        "webp.jpg": encoded(image, "WEBP", lossless=True),
        "gif.jpg": encoded(image.convert("P"), "GIF"),
        "alpha.png": encoded(image.convert("RGBA"), "PNG"),
        "großer Ast 1.jpg": encoded(image),
    }


@pytest.mark.parametrize("name", STREAMING)
def test_odd_images_are_read_as_pillow_reads_them(tmp_path, opened, name):
    write_photos(tmp_path, splits=("train", "test", "meta"))
    folder = tmp_path / "test" / "bee"
    for file in folder.iterdir():
        file.unlink()
    for file, data in odd_images().items():
        (folder / file).write_bytes(data)
    wanted = torch.cat([batch.images for batch in opened(tmp_path, "resident").test])
    loaders = opened(tmp_path, name)
    got = torch.cat([batch.images for batch in loaders.test])
    assert len(got) == 8 + 10
    assert not loaders.bad_count()
    assert alike(got, wanted)


@needs_dali
def test_a_file_that_dali_fails_on_takes_nothing_with_it(tmp_path, opened, capfd):
    """A header that looks whole, and nothing behind it: DALI gives up the batch, and Pillow finds the culprit."""
    write_photos(tmp_path, splits=("train", "test", "meta"))
    whole = (tmp_path / "train/ant/1.jpg").read_bytes()
    scan = whole.index(b"\xff\xda")
    (tmp_path / "train/ant/1.jpg").write_bytes(whole[:scan] + b"\xff\xda" + b"\xff\xd9")
    settings = {"crop": "random", "max_bad_fraction": 0.1, "auto_augment": "imagenet"}
    loaders = opened(tmp_path, "dali", **settings)
    for _ in range(3):
        assert set(torch.cat([batch.ids for batch in take(loaders.train, 4)]).tolist()) == set(range(16)) - {1}
    assert loaders.bad[0].reasons.keys() == {1}
    capfd.readouterr()  # DALI writes to stderr itself


@needs_dali
def test_dali_going_wrong_for_another_reason_is_an_error(photos, opened, monkeypatch):
    loaders = opened(photos, "dali", crop="random")
    loaders.train.backend.work = Work(
        loaders.train.backend.work.geometry, 2, CPU, 1, (0.5,) * 3, (0.5,) * 3, training=True
    )  # batches larger than the pipeline's
    with pytest.raises(RuntimeError):
        take(loaders.train, 1)


@pytest.mark.parametrize("name", STREAMING)
def test_a_batch_that_cannot_be_filled(tmp_path, opened, name):
    write_photos(tmp_path, splits=("train", "test", "meta"))
    loaders = opened(tmp_path, name, crop="random", max_bad_fraction=1.0)
    for file in (tmp_path / "train").rglob("*.jpg"):
        file.write_bytes(b"x")
    with pytest.raises(UserError, match=r"so many cannot be read that it cannot be filled"):
        take(loaders.train, 1)


# ---- choice ----


def chosen(root, device="cpu", **settings):
    config = resolve(Config, dataset="imagefolder", data_root=str(root), **settings)
    return choose_loader(config, load_source(config), 24, torch.device(device))[0]


def test_auto_takes_what_fits_into_memory_and_streams_the_rest(photos, monkeypatch):
    assert chosen(photos) == "resident"
    monkeypatch.setattr("fastadvisor.loading.choose.available_memory", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 1000))
    for installed, name in ((True, "dali"), (False, "torch")):
        monkeypatch.setattr(dali, "available", lambda installed=installed: installed)
        assert chosen(photos, crop="resized") == chosen(photos) == chosen(photos, "cuda") == name
    assert chosen(photos, loader="synthetic") == "synthetic"


def test_choices_that_cannot_be(photos, monkeypatch):
    with pytest.raises(UserError, match="--loader resident crops by padding only, and --crop is random"):
        chosen(photos, loader="resident", crop="random")
    monkeypatch.setattr(dali, "available", lambda: False)
    with pytest.raises(UserError, match="--loader dali needs NVIDIA DALI: pip install"):
        chosen(photos, loader="dali")


def test_a_hole_larger_than_the_images(photos, opened):
    with pytest.raises(UserError, match="--cutout 25 is larger than the images, which are 24 pixels"):
        opened(photos, "torch", cutout=25)


def test_states_of_other_loaders_and_sets_are_refused(photos, opened):
    torch_state = opened(photos, "torch").train.state_dict()
    with pytest.raises(UserError, match="another loader"):
        opened(photos, "resident").train.load_state_dict(torch_state)
    with pytest.raises(UserError, match="another loader"):
        opened(photos, "torch").train.load_state_dict(opened(photos, "resident").train.state_dict())
    torch_state["count"] = 5
    with pytest.raises(UserError, match="drew from 5 images, this one has 16"):
        opened(photos, "torch").train.load_state_dict(torch_state)


def test_no_thread_or_process_outlives_its_loader(photos, opened):
    import threading

    def ours():
        return [thread for thread in threading.enumerate() if thread.name.startswith("fastadvisor")]

    before = len(os.listdir("/proc/self/task"))
    for name in ("torch", *(["dali"] if dali.available() else [])):
        loaders = opened(photos, name, crop="random")
        take(loaders.train, 1)
        loaders.close()
    assert ours() == []
    assert len(os.listdir("/proc/self/task")) <= before + 4  # DALI's own pool may stay


@needs_dali
def test_workers_are_forked_without_dead_dali_pipelines(photos, opened):
    """One that is collected in a worker waits there for threads that it does not have: the batch would never come."""
    pytest.importorskip("nvidia.dali")
    collected = []

    class Dead:
        def __del__(self):
            collected.append(os.getpid())

    gc.disable()
    try:
        dead = Dead()
        dead.itself = dead
        del dead
        take(opened(photos, "torch").train, 1)
    finally:
        gc.enable()
    assert collected == [os.getpid()]
