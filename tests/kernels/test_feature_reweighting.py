import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck, gradgradcheck

from fastadvisor_kernels import reweight_features

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MARGIN = {torch.float32: 5e-4, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def make(shape, dtype=torch.float64, u_dtype=None, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    f, u, g = (scale * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return f.to(dtype), u.to(u_dtype or dtype), g.to(dtype)


def run(f, u, g):
    f, u = f.detach().requires_grad_(), u.detach().requires_grad_()
    h = reweight_features(f, u)
    return h.detach(), *grad(h, (f, u), g)


def closed_form(f, u, g):
    """The README's gradients, in float64."""
    f, u, g = f.double(), u.double(), g.double()
    w = 1 / (1 + torch.exp(-u))
    return f * w, w * g, f * w * (1 - w) * g


@pytest.mark.parametrize("shape", [(3, 4), (5,), (2, 3, 4)])
def test_gradcheck(shape):
    f, u, _ = make(shape)
    inputs = (f.requires_grad_(), u.requires_grad_())
    assert gradcheck(reweight_features, inputs, check_forward_ad=True)
    assert gradgradcheck(reweight_features, inputs)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (2, 3, 4), (0, 4)])
def test_closed_form_gradients_of_the_readme(shape):
    f, u, g = make(shape)
    torch.testing.assert_close(run(f, u, g), closed_form(f, u, g), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("u_dtype", DTYPES)
@pytest.mark.parametrize("f_dtype", DTYPES)
def test_error_rule(f_dtype, u_dtype):
    f, u, g = make((33, 65), f_dtype, u_dtype, scale=1.0)
    got, want = run(f, u, g), closed_form(f, u, g)
    assert [t.dtype for t in got] == [f_dtype, f_dtype, u_dtype]
    w = torch.sigmoid(u)
    naive = [(f * w).double(), (w * g).double(), (f * w * (1 - w) * g).double()]
    for value, expected, plain, dtype in zip(got, want, naive, [f_dtype, f_dtype, u_dtype], strict=True):
        error, allowed = (value.double() - expected).abs().max(), (plain - expected).abs().max()
        assert error <= allowed + MARGIN[dtype]


def test_the_product_is_rounded_once():
    # Within half a unit in the last place; in bfloat16 throughout, sigmoid and product would round twice.
    f, u, _ = make((64, 64), torch.bfloat16)
    exact = f.double() * torch.sigmoid(u.double())
    half_a_unit = torch.finfo(torch.bfloat16).eps / 2 * exact.abs() * 1.001
    assert ((reweight_features(f, u).double() - exact).abs() <= half_a_unit).all()
    assert (((f * torch.sigmoid(u)).double() - exact).abs() > half_a_unit).any()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (7, 513)])
def test_extremes_stay_finite(shape, dtype):
    signs = torch.randint(0, 2, (2, *shape), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    f, u = (1e4 * signs[0]).to(dtype), (1e4 * signs[1]).to(dtype)
    h, f_grad, u_grad = run(f, u, torch.ones(shape, dtype=dtype))
    assert all(t.isfinite().all() for t in (h, f_grad, u_grad))
    opened = (u > 0).to(dtype)
    assert torch.equal(h, f * opened)
    assert torch.equal(f_grad, opened)
    assert torch.equal(u_grad, torch.zeros_like(u))


def test_layout_does_not_matter():
    f, u, g = make((7, 10), torch.float32)
    want = run(f, u, g)

    def unaligned(t):
        whole = torch.full((8, 13), float("nan"))
        whole[1:, 1:-2] = t
        return whole[1:, 1:-2]

    for layout in (unaligned, lambda t: t.t().contiguous().t()):
        assert not layout(f).is_contiguous()
        for got in (run(layout(f), u, g), run(f, layout(u), layout(g)), run(layout(f), layout(u), layout(g))):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("f", "u"), [((3, 4), (3, 5)), ((3, 4), (1, 4)), ((3, 4), (4,)), ((3, 4), (3, 4, 1))])
def test_wrong_shapes(f, u):
    with pytest.raises(ValueError, match="one shape"):
        reweight_features(torch.zeros(f), torch.zeros(u))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.1, 5.0, 1e3]), st.sampled_from(DTYPES))
def test_shrinks_and_keeps_the_sign(seed, scale, dtype):
    f, u, _ = make((3, 8), dtype, scale=scale, seed=seed)
    h = reweight_features(f, u)
    assert (h.abs() <= f.abs()).all()
    assert (h * f >= 0).all()
    assert (reweight_features(f, u + 1).abs() >= h.abs()).all()
    assert torch.equal(reweight_features(-f, u), -h)
    # σ(u) + σ(−u) = 1: the mask and its mirror share out the feature.
    torch.testing.assert_close((h + reweight_features(f, -u)).float(), f.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
