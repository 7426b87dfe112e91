"""Augmentation against torch's own padding, and the stream of batches."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from fastadvisor.config import DataConfig
from fastadvisor.datasets import load_source, prepare
from fastadvisor.errors import UserError
from fastadvisor.loading import Augmentation, ResidentImages, ResidentLoader, normalize

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
CPU = torch.device("cpu")


def some_images(count=64, height=8, width=9, seed=0):
    return torch.randint(0, 256, (count, height, width, 3), generator=torch.Generator().manual_seed(seed)).byte()


def crops(image, padding, flip):
    """Every crop of one (H, W, 3) image by torch's own reflect padding, normalised, (n, 3, H, W)."""
    height, width = image.shape[:2]
    planes = image.permute(2, 0, 1).double() / 255
    planes = (planes - torch.tensor(MEAN).double()[:, None, None]) / torch.tensor(STD).double()[:, None, None]
    padded = F.pad(planes[None], (padding,) * 4, mode="reflect")[0] if padding else planes
    shifts = itertools.product(range(2 * padding + 1), repeat=2)
    out = [padded[:, top : top + height, left : left + width] for top, left in shifts]
    return torch.stack(out + [crop.flip(-1) for crop in out] if flip else out)


@pytest.mark.parametrize(("padding", "flip"), [(0, False), (0, True), (2, False), (4, True), (7, True)])
def test_every_sample_is_one_of_the_crops_of_the_padded_image(padding, flip):
    images, ids = some_images(), torch.randperm(64)[:32]
    batch = Augmentation(padding, flip, MEAN, STD)(images, ids, torch.Generator().manual_seed(1))
    assert batch.shape == (32, 3, 8, 9)
    assert batch.dtype == torch.float32
    assert batch.is_contiguous()
    for image, augmented in zip(images[ids], batch, strict=True):
        distance = (crops(image, padding, flip) - augmented.double()).abs().amax(dim=(1, 2, 3))
        assert distance.min() < 1e-5


def test_samples_get_crops_and_mirrors_of_their_own_and_all_of_them_occur():
    images = some_images(1)
    batch = Augmentation(1, True, MEAN, STD)(images, torch.zeros(2000, dtype=torch.int64), torch.Generator())
    possible = crops(images[0], 1, True)
    which = torch.cdist(batch.flatten(1).double(), possible.flatten(1)).argmin(dim=1)
    counts = torch.bincount(which, minlength=18)
    assert counts.min() > 60  # 111 expected of each of 9 crops and 2 mirrors
    assert counts.max() < 170


def test_normalize():
    images = some_images(5)
    wanted = torch.stack([crops(image, 0, False)[0] for image in images])
    torch.testing.assert_close(normalize(images, MEAN, STD), wanted.float(), rtol=0, atol=2e-6)
    assert normalize(images, MEAN, STD).is_contiguous()


def test_padding_must_fit():
    with pytest.raises(UserError, match="--crop-padding 8 is too large for images of 8 pixels: use at most 7"):
        Augmentation(8, True, MEAN, STD)(some_images(), torch.arange(4), torch.Generator())


def table(count=64):
    return ResidentImages(some_images(count), torch.arange(count) % 7)


def loader(ids=None, batch_size=4, seed=0, images=None):
    ids = torch.arange(10, 33) if ids is None else ids
    augment = Augmentation(2, True, MEAN, STD)
    return ResidentLoader(images or table(), ids, batch_size, augment=augment, device=CPU, seed=seed)


def test_an_epoch_has_every_sample_at_most_once_and_the_next_another_order():
    stream = loader()
    assert len(stream) == 5
    epochs = [torch.cat([next(stream).ids for _ in range(5)]) for _ in range(3)]
    for ids in epochs:
        assert len(set(ids.tolist())) == 20
        assert set(ids.tolist()) <= set(range(10, 33))
    assert not torch.equal(epochs[0], epochs[1])
    assert set(torch.cat(epochs).tolist()) == set(range(10, 33))


def test_labels_and_images_belong_to_the_ids():
    images = table()
    stream = ResidentLoader(images, torch.arange(64), 16, augment=Augmentation(0, False, MEAN, STD), device=CPU, seed=0)
    batch = stream.next_batch()
    assert torch.equal(batch.labels, images.labels[batch.ids])
    assert torch.equal(batch.images, normalize(images.images[batch.ids], MEAN, STD))
    assert batch.labels.dtype == batch.ids.dtype == torch.int64


def test_loaders_share_one_table_and_the_cpu_shares_the_data():
    data = prepare(load_source(DataConfig()), DataConfig(), 0)
    shared = ResidentImages.of(data, CPU)
    train, meta = loader(data.train_ids, images=shared), loader(data.meta_ids, images=shared)
    assert train.table.images.data_ptr() == meta.table.images.data_ptr() == data.images.pixels.data_ptr()
    own = ResidentLoader(data, data.meta_ids, 100, augment=Augmentation(1, False, MEAN, STD), device=CPU, seed=0)
    assert sorted(own.next_batch().ids.tolist()) == sorted(data.meta_ids.tolist())


def equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_seeds():
    one, again, other = (loader(seed=seed) for seed in (0, 0, 1))
    assert equal(next(one), next(again))
    assert not torch.equal(next(one).ids, next(other).ids)


@pytest.mark.parametrize("taken", [0, 3, 5, 7])
def test_a_saved_stream_continues_exactly(tmp_path, taken):
    stream = loader()
    for _ in range(taken):
        next(stream)
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    wanted = [next(stream) for _ in range(12)]
    resumed = loader(seed=99)
    next(resumed)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for batch in wanted:
        assert equal(batch, next(resumed))


def test_taking_the_state_does_not_disturb_the_stream():
    one, two = loader(), loader()
    one.state_dict()
    assert equal(next(one), next(two))


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = next(loader())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert equal(one, next(loader()))


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="batch of 24 is larger than the 23 images"):
        loader(batch_size=24)
    with pytest.raises(UserError, match="--crop-padding 8"):
        ResidentLoader(table(), torch.arange(9), 3, augment=Augmentation(8, True, MEAN, STD), device=CPU, seed=0)
    with pytest.raises(UserError, match="saved run drew from 23 images, this one has 9"):
        loader(torch.arange(9)).load_state_dict(loader().state_dict())


def test_a_batch_as_large_as_the_set():
    stream = loader(torch.arange(6), batch_size=6)
    assert [sorted(next(stream).ids.tolist()) for _ in range(3)] == [list(range(6))] * 3
