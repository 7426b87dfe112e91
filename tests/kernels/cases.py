"""What the kernel tests share: inputs, kinds of β, the error rule of design section 7, and where Triton runs here."""

import torch

from fastadvisor_kernels import Bernoulli

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Of Triton's kernels: without a GPU the interpreter runs them (tests/conftest.py)."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MARGIN = {torch.float64: 1e-12, torch.float32: 5e-4, torch.float16: 1e-3, torch.bfloat16: 1e-2}
BETAS = ["none", 0.9, 0.0, 1.0, "per sample", "per class", "batch", "drawn"]
CLASSES = [1, 2, 10, 14, 100, 365, 1000, 1023]
SEVERAL_TILES = [4097, 20_000]
"""More classes than a tile holds: in a few segments, and in more segments than chunks."""


def make(batch, classes, dtype=torch.float64, v_dtype=None, scale=2.0, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(batch, classes, generator=generator, dtype=torch.float64)
    v = scale * torch.randn(batch, classes, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (batch,), generator=generator)
    return z.to(device, dtype), v.to(device, v_dtype or dtype), y.to(device)


def make_beta(kind, batch, classes, seed=1, device="cpu"):
    if kind == "none":
        return None
    if isinstance(kind, float):
        return kind
    generator = torch.Generator().manual_seed(seed)
    if kind == "drawn":
        seed = torch.randint(2**63 - 1, (), generator=generator).to(device)
        return Bernoulli(0.6, seed, first_row=5)  # of a mask that others share
    shape = {"per sample": (batch, 1), "per class": (batch, classes), "batch": (1, 1)}[kind]
    return (torch.rand(shape, generator=generator) < 0.6).double().to(device)


def as_number(beta, batch, classes):
    """β as something to multiply with."""
    if isinstance(beta, Bernoulli):
        return beta.mask(batch, classes).double()
    return 1.0 if beta is None else beta


def unaligned(tensor):
    """The same values, four bytes and a row into a larger tensor of NaN."""
    whole = torch.full((tensor.shape[0] + 1, tensor.shape[1] + 3), float("nan"), dtype=tensor.dtype, device=tensor.device)
    whole[1:, 1:-2] = tensor
    return whole[1:, 1:-2]


def strided(tensor):
    """The same values, in every third column of every second row."""
    whole = torch.full((2 * tensor.shape[0], 3 * tensor.shape[1]), float("nan"), dtype=tensor.dtype, device=tensor.device)
    whole[::2, ::3] = tensor
    return whole[::2, ::3]


def transposed(tensor):
    return tensor.t().contiguous().t()


LAYOUTS = [transposed, unaligned, strided]


def assert_within_the_rule(got, reference, truth):
    """error(kernel, float64) ≤ error(torch in the same dtypes, float64) + the margin of the dtype."""
    for value, same, true in zip(got, reference, truth, strict=True):
        assert value.dtype == same.dtype
        assert value.shape == same.shape
        error, allowed = ((part.double() - true.double()).abs().max() if part.numel() else 0.0 for part in (value, same))
        assert error <= allowed + MARGIN[value.dtype], f"{value.dtype}: {error} > {allowed} + {MARGIN[value.dtype]}"


def assert_same_bits(got, want):
    """On a GPU. Under the interpreter nearly so: numpy's functions depend in the last bit on where an array lies in memory."""
    if all(value.is_cuda for value in got):
        assert all(torch.equal(value, expected) for value, expected in zip(got, want, strict=True))
    else:
        assert_nearly_the_same(got, want)


def assert_nearly_the_same(got, want):
    """Up to the order of a sum, which follows from how the input is read: by its alignment and its dtypes."""
    for value, expected in zip(got, want, strict=True):
        tolerance = 2 * torch.finfo(value.dtype).eps
        size = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=max(tolerance, 1e-5) * size)
