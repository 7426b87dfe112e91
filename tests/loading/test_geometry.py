"""Windows against torchvision's own transforms, JPEG headers against Pillow, the order of samples."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from fastadvisor.config import LoaderConfig
from fastadvisor.errors import UserError
from fastadvisor.loading.decode import Unreadable, decode_rgb, evaluation_pixels
from fastadvisor.loading.geometry import AREA, ASPECT, DRAWS, Geometry
from fastadvisor.loading.jpeg import plain_jpeg_size
from fastadvisor.loading.order import SPARES, Order, list_sequential_specs
from tests.photos import encoded, photo

SIZES = [(60, 45), (45, 60), (64, 64), (33, 64), (101, 37), (224, 225)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("side", "resize"), [(24, 24), (24, 32), (32, 37), (21, 24)])
def test_the_test_box_is_torchvisions_resize_and_centre_crop(size, side, resize):
    image = photo(*size)
    wanted = v2.CenterCrop(side)(v2.Resize(resize)(image))
    got = evaluation_pixels(image, Geometry(side, resize, "pad"))
    # One grey level of rounding between Pillow's two passes, and the filter's reach over the border of the crop.
    assert np.abs(got.astype(int) - np.asarray(wanted).astype(int)).max() <= 2


def test_an_image_that_has_the_size_keeps_its_pixels():
    image = photo(32, 32)
    assert np.array_equal(evaluation_pixels(image, Geometry(32, 32, "pad")), np.asarray(image))


def draws(count, seed=0):
    return np.random.default_rng(seed).random((count, DRAWS))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop", ["random", "resized"])
def test_train_boxes_lie_inside_the_image(size, crop):
    geometry = Geometry(21, 24, crop)
    boxes = np.array([geometry.train_box(*size, row) for row in draws(300)])
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2] <= size[0]).all()
    assert (boxes[:, 3] <= size[1]).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_random_crops_keep_the_scale_and_reach_every_corner():
    boxes = np.array([Geometry(21, 24, "random").train_box(96, 48, row) for row in draws(2000)])
    assert set((boxes[:, 2] - boxes[:, 0]).tolist()) == set((boxes[:, 3] - boxes[:, 1]).tolist()) == {42}
    assert (boxes[:, :2].min(axis=0) == 0).all()
    assert (boxes[:, 2:].max(axis=0) == (96, 48)).all()


def test_resized_crops_have_torchvisions_areas_and_aspects():
    size = (400, 300)
    boxes = np.array([Geometry(24, 27, "resized").train_box(*size, row) for row in draws(3000)])
    w, h = (boxes[:, 2] - boxes[:, 0]).astype(float), (boxes[:, 3] - boxes[:, 1]).astype(float)
    area, aspect = w * h / (size[0] * size[1]), np.log(w / h)
    assert area.min() >= AREA[0] - 0.01
    assert aspect.min() >= math.log(ASPECT[0]) - 0.1
    assert aspect.max() <= math.log(ASPECT[1]) + 0.1
    torch.manual_seed(0)
    image = torch.empty(3, size[1], size[0])
    theirs = np.array([v2.RandomResizedCrop.make_params(v2.RandomResizedCrop(24), [image])["height"] for _ in range(3000)])
    assert abs(theirs.mean() - h.mean()) < 5
    assert abs(theirs.std() - h.std()) < 5


def test_images_that_no_try_fits_give_their_largest_window_of_a_near_ratio():
    assert Geometry(8, 9, "resized").train_box(1000, 2, draws(1)[0])[2:] >= (3, 2)
    left, top, right, bottom = Geometry(8, 9, "resized").train_box(2, 1000, draws(1)[0])
    assert (right - left, bottom - top) == (2, 3)


def test_a_crop_larger_than_the_resized_image_is_refused():
    with pytest.raises(UserError, match="--resize-size 20 is under the 24 pixels"):
        Geometry.of(LoaderConfig(resize_size=20), 24)
    assert Geometry.of(LoaderConfig(crop="resized"), 224).resize == 256
    assert Geometry.of(LoaderConfig(), 224).resize == 224


# ---- headers ----


def exif(orientation):
    data = Image.Exif()
    data[0x0112] = orientation
    return data


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 20, "subsampling": 0}, {"comment": b"x" * 70}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_jpegs_have_a_size(options, mode):
    assert plain_jpeg_size(encoded(photo(61, 47).convert(mode), **options)) == (61, 47)


def test_data_after_the_end_is_fine_and_an_upright_exif_tag_too():
    assert plain_jpeg_size(encoded(photo(61, 47)) + b"\0" * 300) == (61, 47)
    assert plain_jpeg_size(encoded(photo(61, 47), exif=exif(1))) == (61, 47)


def test_what_decoders_may_read_differently_goes_to_pillow():
    image = photo(61, 47)
    whole = encoded(image)
    others = [
        encoded(image.convert("CMYK")),
        encoded(image, exif=exif(6)),
        encoded(image, "PNG"),
        whole[:-2],
        whole[: len(whole) // 2],
        whole[:2],
        b"",
        b"<html>",
        b"\xff\xd8\xff\xd9",
        b"\xff\xd8" + b"\xff" * 50 + b"\xff\xd9",
        b"\xff\xd8\xff\xe0\x00\x00" + b"\0" * 20 + b"\xff\xd9",
    ]
    assert [plain_jpeg_size(data) for data in others] == [None] * len(others)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_random_bytes_never_raise():
    rng = np.random.default_rng(0)
    whole = encoded(photo(40, 30), exif=exif(1))
    for _ in range(300):
        damaged = bytearray(whole)
        for position in rng.integers(2, 400, 5):
            damaged[position] = rng.integers(256)
        plain_jpeg_size(bytes(damaged))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<html>", "not an image"),
        (encoded(photo(60, 45))[:-500], "cut short"),
        (encoded(photo(60, 45), "PNG")[:-500], "cut short|damaged"),
    ],
)
def test_reasons(data, reason):
    with pytest.raises(Unreadable, match=reason):
        decode_rgb(data)


# ---- order ----


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_epoch_holds_every_id_once_over_all_ranks(ranks):
    ids = np.arange(100, 124)
    orders = [Order(ids, 12 // ranks, 5, rank, ranks) for rank in range(ranks)]
    assert {len(order) for order in orders} == {2}
    for epoch in range(3):
        parts = [order.spec(2 * epoch + position).ids for order in orders for position in range(2)]
        assert sorted(np.concatenate(parts).tolist()) == ids.tolist()


def test_ranks_see_together_what_one_would():
    ids = np.arange(50)
    whole, parts = Order(ids, 8, 1), [Order(ids, 4, 1, rank, 2) for rank in range(2)]
    for number in (0, 5, 6, 13):
        one, two = whole.spec(number), [part.spec(number) for part in parts]
        assert np.array_equal(one.ids, np.concatenate([spec.ids for spec in two]))
        assert np.array_equal(one.draws, np.concatenate([spec.draws for spec in two]))
        assert all(np.array_equal(one.spares, spec.spares) for spec in two)


def test_batches_are_a_function_of_seed_and_number():
    order = Order(np.arange(50), 8, 3)
    forwards = [order.spec(number) for number in range(20)]
    other = Order(np.arange(50), 8, 3)
    for number in (19, 0, 7, 6):
        again = other.spec(number)
        assert again.number == number
        assert np.array_equal(again.ids, forwards[number].ids)
        assert np.array_equal(again.draws, forwards[number].draws)
    assert len(forwards[0].spares) == SPARES
    assert not np.array_equal(forwards[0].draws, forwards[1].draws)
    epoch = np.concatenate([spec.ids for spec in forwards[:6]])
    assert len(np.unique(epoch)) == 48
    assert not np.array_equal(forwards[0].ids, forwards[6].ids)
    assert not np.array_equal(Order(np.arange(50), 8, 4).spec(0).ids, forwards[0].ids)


def test_in_sequence():
    specs = list_sequential_specs(10, 4)
    assert [spec.ids.tolist() for spec in specs] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert specs[0].draws is None
    assert list_sequential_specs(0, 4) == []
