"""The Triton kernels of the re-weighting, against float64 and against the reference."""

import pytest
import torch
from torch.autograd import grad

from fastadvisor_kernels import backend, reweight_dual, reweight_features
from tests.kernels.cases import DEVICE, DTYPES, LAYOUTS, assert_same_bits, assert_within_the_rule

SHAPES = [(), (1,), (5,), (1, 1), (7, 513), (3, 1024), (2, 3, 4), (0, 4), (2500, 3)]


def make(shape, dtype=torch.float64, seed=0):
    """f, ḟ, u and two gradients."""
    generator = torch.Generator().manual_seed(seed)
    # Below 2, as the interpreter cuts bfloat16 off where a GPU rounds.
    return [(0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(DEVICE, dtype) for _ in range(5)]


def run(name, f, f_dot, u, g, g_dot):
    """Product and gradients, of one feature and of two."""
    f, f_dot, u = (part.detach().requires_grad_() for part in (f, f_dot, u))
    with backend(name):
        h = reweight_features(f, u)
        of_one = h.detach(), *grad(h, (f, u), g.to(h.dtype))
        pair = reweight_dual(f, f_dot, u)
        of_two = *(part.detach() for part in pair), *grad(pair, (f, f_dot, u), [part.to(pair[0].dtype) for part in (g, g_dot)])
    return *of_one, *of_two


def all_three(*tensors):
    wide = (tensor.double() for tensor in tensors)
    return run("triton", *tensors), run("reference", *tensors), run("reference", *wide)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_rule(shape, dtype):
    assert_within_the_rule(*all_three(*make(shape, dtype)))


@pytest.mark.parametrize("u_dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("f_dtype", [torch.float64, *DTYPES])
def test_mixed_dtypes(f_dtype, u_dtype):
    f, f_dot, u, g, g_dot = make((5, 9))
    assert_within_the_rule(*all_three(f.to(f_dtype), f_dot.to(f_dtype), u.to(u_dtype), g.to(f_dtype), g_dot.to(f_dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes(dtype):
    signs = torch.randint(0, 2, (2, 7, 513), generator=torch.Generator().manual_seed(0)).to(DEVICE) * 2.0 - 1
    f, u = (1e4 * signs[0]).to(dtype), (1e4 * signs[1]).to(dtype)
    opened = (u > 0).to(dtype)
    h, f_grad, u_grad, *_ = run("triton", f, f, u, torch.ones_like(f), torch.ones_like(f))
    assert torch.equal(h, f * opened)
    assert torch.equal(f_grad, opened)
    assert torch.equal(u_grad, torch.zeros_like(u))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_matter(layout):
    given = make((70, 33), torch.bfloat16)
    want = run("triton", *given)
    for index in range(5):
        got = run("triton", *(layout(part) if place == index else part for place, part in enumerate(given)))
        assert_same_bits(got, want)


def test_a_row_for_all():
    f, f_dot, u, g, g_dot = make((5, 9), torch.float32)
    want = run("triton", f, f_dot, u[:1].repeat(5, 1), g, g_dot)
    got = run("triton", f, f_dot, u[:1].expand(5, 9), g, g_dot)
    assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_in_place(dtype):
    f, _, u, g, _ = make((40, 33), dtype)
    for given in (f.clone(), f.t().contiguous().t(), torch.cat([f, f], dim=1)[:, 33:]):
        leaf, mask = given.clone().requires_grad_(), u.clone().requires_grad_()
        with backend("triton"):
            assert reweight_features(given, u, inplace=True) is given
            own = leaf * 1
            h = reweight_features(own, mask, inplace=True)
            got = given, *grad(h, (leaf, mask), g)
        with backend("reference"):
            want = reweight_features(leaf, mask)
            want = want.detach(), *grad(want, (leaf, mask), g)
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_every_element_is_written(monkeypatch):
    allocate = torch.Tensor.new_empty

    def filled(self, *args, **kwargs):
        tensor = allocate(self, *args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)
    for shape in SHAPES:
        assert all(part.isfinite().all() for part in run("triton", *make(shape, torch.float32)))
