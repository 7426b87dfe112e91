"""The mask that is named by a seed: the generator against its published answers, the kernel against the reference."""

import pytest
import torch
import triton
import triton.language as tl

from fastadvisor_kernels import Bernoulli
from fastadvisor_kernels.bernoulli import random_bits
from fastadvisor_kernels.bernoulli.reference import philox
from fastadvisor_kernels.bernoulli.triton import bernoulli
from tests.kernels.cases import DEVICE

# Random123's kat_vectors, "philox4x32 10": counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, words):
    got = philox(torch.tensor(key), tuple(torch.tensor(word) for word in counter))
    assert tuple(int(word) for word in got) == words


@triton.jit
def write_mask(seed_ptr, out_ptr, first, start, THRESHOLD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    drawn = bernoulli(seed_ptr, first + tl.arange(0, ROWS), start, THRESHOLD, ROWS, BLOCK)
    at = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out_ptr + at, drawn.to(tl.float32))


@pytest.mark.parametrize("probability", [0.0, 1e-4, 0.5, 0.9, 1.0])
def test_the_kernel_draws_the_same_mask(probability):
    drawn = Bernoulli.draw(probability, DEVICE, torch.Generator(DEVICE).manual_seed(3))
    whole = drawn.mask(1000, 300)
    out = torch.full((4, 64), float("nan"), device=DEVICE)
    for first, start in ((0, 0), (990, 128)):
        write_mask[(1,)](drawn.seed, out, first, start, drawn.threshold, 4, 64)
        assert torch.equal(out != 0, whole[first : first + 4, start : start + 64])
        assert set(out.unique().tolist()) <= {0.0, 1.0}


def test_a_mask_depends_on_neither_size():
    drawn = Bernoulli.draw(0.5, "cpu", torch.Generator().manual_seed(0))
    assert torch.equal(drawn.mask(7, 10), drawn.mask(100, 1023)[:7, :10])


def test_parts_of_a_mask_make_up_the_whole():
    drawn = Bernoulli.draw(0.5, "cpu", torch.Generator().manual_seed(0))
    parts = [drawn.mask(4, 10), drawn.rows(4).mask(3, 10), drawn.rows(4).rows(3).mask(5, 10)]
    assert torch.equal(torch.cat(parts), drawn.mask(12, 10))


def test_rows_classes_and_seeds_are_independent():
    size = 512
    first, second = (
        random_bits(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(seed)), size, size).double() / 2**32
        for seed in (1, 2)
    )
    assert abs(first.mean() - 0.5) < 5 * (1 / 12) ** 0.5 / size
    assert len(first.unique()) == pytest.approx(size * size, rel=1e-4)
    for left, right in ((first, second), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1]), (first[:, 4:], first[:, :-4])):
        correlation = torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1]
        assert abs(correlation) < 5 / size


def test_the_share_of_ones():
    drawn = Bernoulli.draw(0.9, "cpu", torch.Generator().manual_seed(0))
    assert abs(drawn.mask(1000, 1000).double().mean() - 0.9) < 5 * 0.3 / 1000


def test_a_seed_comes_from_torchs_random_numbers():
    torch.manual_seed(0)
    first, second = Bernoulli.draw(0.5, "cpu"), Bernoulli.draw(0.5, "cpu")
    assert first.seed != second.seed
    torch.manual_seed(0)
    assert Bernoulli.draw(0.5, "cpu") == first


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_a_probability_out_of_range(probability):
    with pytest.raises(ValueError, match="probability must lie in"):
        Bernoulli.draw(probability, "cpu")
