"""AutoAugment on a batch against torchvision's on one image, and Cutout."""

import math
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

from benchmarks.photos import photo
from fastadvisor.loading import autoaugment
from fastadvisor.loading.autoaugment import BINS, GEOMETRIC, POLICIES, WITHOUT_SIGN, AutoAugment, Operation, apply, cutout

THEIRS = {"cifar10": v2.AutoAugmentPolicy.CIFAR10, "imagenet": v2.AutoAugmentPolicy.IMAGENET}
WITH_BIN = ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness"]
OPERATIONS = [Operation(name, step, negative) for name in WITH_BIN for step in range(BINS) for negative in (False, True)]
OPERATIONS += [Operation(name, step) for name in ("Posterize", "Solarize") for step in range(BINS)]
OPERATIONS += [Operation(name) for name in ("AutoContrast", "Equalize", "Invert")]


def batch(height, width):
    noise = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    smooth = v2.functional.pil_to_tensor(photo(width, height))
    dark = (smooth // 4 + 20).to(torch.uint8)
    return torch.cat([noise, torch.stack([smooth, dark, torch.full_like(smooth, 77)])])


def theirs(images, operation):
    """The same operation by torchvision's own AutoAugment, image by image."""
    transform = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    magnitudes, _ = transform._AUGMENTATION_SPACE[operation.name]
    values = magnitudes(BINS, *images.shape[-2:])
    magnitude = 0.0 if operation.bin is None else float(values[operation.bin])
    magnitude = -magnitude if operation.negative else magnitude
    options = {"interpolation": v2.InterpolationMode.NEAREST, "fill": {torch.Tensor: None}}
    return torch.stack(
        [transform._apply_image_or_video_transform(image, operation.name, magnitude, **options) for image in images]
    )


@pytest.mark.parametrize("name", sorted({operation.name for operation in OPERATIONS}))
@pytest.mark.parametrize("size", [(32, 32), (24, 41)])
def test_every_operation_equals_torchvisions(name, size):
    images = batch(*size)
    for operation in OPERATIONS:
        if operation.name != name:
            continue
        got, wanted = apply(images, operation), theirs(images, operation)
        assert got.dtype == torch.uint8
        if name in GEOMETRIC:  # nearest neighbour: where a source lies between two pixels, the last bit decides
            assert (got != wanted).any(dim=1).float().mean() < 0.004
        else:
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", POLICIES)
def test_the_policies_are_torchvisions(name):
    assert list(POLICIES[name]) == v2.AutoAugment(THEIRS[name])._policies
    signed = {name for name, (_, signed) in v2.AutoAugment._AUGMENTATION_SPACE.items() if signed}
    assert not signed & WITHOUT_SIGN
    assert {step[0] for pair in POLICIES[name] for step in pair} <= signed | WITHOUT_SIGN


def test_each_sample_gets_its_own_operations_as_often_as_the_policy_says(monkeypatch):
    seen = []
    monkeypatch.setattr(autoaugment, "_apply_all", lambda images, operations: seen.append(operations) or images)
    count = 60_000
    AutoAugment("cifar10")(torch.empty(count, 3, 1, 1), torch.Generator().manual_seed(0))
    first, second = (Counter(operations) for operations in seen)
    for found, place in ((first, 0), (second, 1)):
        wanted = Counter()
        for pair in POLICIES["cifar10"]:
            name, probability, step = pair[place]
            wanted[None] += (1 - probability) / 25
            signs = (False,) if name in WITHOUT_SIGN or step is None else (False, True)
            for negative in signs:
                wanted[Operation(name, step, negative)] += probability / 25 / len(signs)
        for operation, share in wanted.items():
            assert abs(found[operation] / count - share) < 5 * math.sqrt(share / count) + 1e-9
        assert set(found) <= set(wanted)


def test_it_is_a_function_of_the_generator():
    images = batch(32, 32).repeat(8, 1, 1, 1)
    policy, host = AutoAugment("imagenet"), torch.Generator().manual_seed(3)
    state = host.get_state()
    one, other = policy(images, host), policy(images, host)
    assert not torch.equal(one, other)
    host.set_state(state)
    assert torch.equal(policy(images, host), one)


def test_samples_of_a_batch_are_treated_one_by_one():
    images = batch(32, 32)[2:3].repeat(64, 1, 1, 1)
    done = AutoAugment("cifar10")(images, torch.Generator().manual_seed(0))
    assert len({tuple(image.flatten().tolist()) for image in done}) > 20
    operations = [Operation("Invert"), None, Operation("Rotate", 3, True), Operation("Invert"), Operation("ShearX", 9)]
    images = batch(32, 32)
    done = autoaugment._apply_all(images, operations)
    for image, operation, got in zip(images, operations, done, strict=True):
        assert torch.equal(got, image if operation is None else apply(image[None], operation)[0])


class NoWaiting(TorchDispatchMode):
    """Fails on what would make the host wait for a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        assert name not in {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}, name
        return function(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device():
    images = batch(32, 32).repeat(40, 1, 1, 1).float()
    uint8 = images.to(torch.uint8)
    host = torch.Generator().manual_seed(0)
    for name in POLICIES:
        operations = [Operation(step, bin, False) for pair in POLICIES[name] for step, _, bin in pair]
        with NoWaiting():
            for operation in operations:
                apply(uint8[:4], operation)
    with NoWaiting():
        cutout(images, 8, host)


def test_cutout_zeroes_one_square_that_may_stick_out():
    count, side, size = 4000, 12, 4
    images = torch.ones(count, 3, side, side)
    done = cutout(images.clone(), size, torch.Generator().manual_seed(0))
    hole = done[:, 0] == 0
    assert torch.equal(done, torch.where(hole[:, None], 0.0, images))
    rows, columns = hole.any(2).sum(1), hole.any(1).sum(1)
    assert torch.equal(hole.sum((1, 2)), rows * columns)
    assert (int(rows.min()), int(rows.max())) == (2, 4)
    # The centre is uniform, so pixels in the middle are hit by size / side of all in each direction.
    assert abs(float(hole[:, 6, 6].float().mean()) - (size / side) ** 2) < 0.02
    assert abs(float(hole[:, 0, 6].float().mean()) - (size / 2 + 1) / side * size / side) < 0.04


@pytest.mark.parametrize(("size", "area"), [(1, 1), (3, 9), (5, 25)])
def test_odd_holes_have_their_size(size, area):
    done = cutout(torch.ones(500, 3, 30, 20), size, torch.Generator().manual_seed(0))
    holes = (done[:, 0] == 0).sum((1, 2))
    assert int(holes.max()) == area


def test_a_hole_larger_than_the_image_leaves_nothing():
    assert not cutout(torch.ones(9, 3, 8, 8), 40, torch.Generator()).any()
