import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck, gradgradcheck

from fastadvisor_kernels import backend, reweight_dual, reweight_features
from fastadvisor_kernels.feature_reweighting import reference
from tests.kernels.cases import DTYPES, MARGIN


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


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (0, 4)])
def test_in_place_is_the_same(shape, dtype):
    f, u, g = make(shape, dtype, scale=1.0)
    want = run(f, u, g)
    f, u = f.requires_grad_(), u.requires_grad_()
    own = f * 1
    h = reweight_features(own, u, inplace=True)
    assert h.data_ptr() == own.data_ptr()
    got = h.detach().clone(), *grad(h, (f, u), g)
    # The gradient of u comes from h, which is rounded to its dtype.
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["reference", "triton"])
@pytest.mark.parametrize("view", [lambda t: t.flatten(1), lambda t: t.squeeze(-1).squeeze(-1), lambda t: t[:, 1:, 0, 0]])
def test_in_place_on_a_view(view, name):
    """Pooled features are one: (B, D, 1, 1) flattened."""
    device = "cuda" if torch.cuda.is_available() else "cpu"  # where the kernels are not interpreted
    pooled = make((5, 7, 1, 1), torch.float32)[0].to(device).requires_grad_()
    u = torch.randn_like(view(pooled)).requires_grad_()
    with backend(name):
        h = reweight_features(view(pooled * 1), u, inplace=True)
        got = h.detach().clone(), *grad(h.square().sum(), (pooled, u))
    with backend("reference"):
        h = reweight_features(view(pooled * 1), u)
        want = h.detach(), *grad(h.square().sum(), (pooled, u))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_in_place_on_a_leaf_is_refused_before_it_is_too_late():
    f, u, _ = make((3, 4))
    before = f.clone()
    with pytest.raises(ValueError, match="a leaf that requires a gradient"):
        reweight_features(f.requires_grad_(), u, inplace=True)
    assert torch.equal(f.detach(), before)
    with torch.no_grad():
        reweight_features(f, u, inplace=True)


def test_in_place_is_seen_by_who_needs_the_features_as_they_were():
    f, u, _ = make((3, 4))
    f.requires_grad_()
    own = f * 1
    squared = own.square()
    reweight_features(own, u, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()


def test_in_place_without_gradients_and_in_any_layout():
    f, u, _ = make((6, 8))
    want = reweight_features(f, u)
    for own in (f.clone(), f.t().contiguous().t(), torch.cat([f, f], dim=1)[:, 8:]):
        assert reweight_features(own, u, inplace=True) is own
        torch.testing.assert_close(own, want, rtol=1e-15, atol=0)


def test_gradcheck_in_place():
    f, u, _ = make((3, 4))
    inputs = (f.requires_grad_(), u.requires_grad_())

    def masked(f, u):
        return reweight_features(f * 1, u, inplace=True)

    assert gradcheck(masked, inputs)
    assert gradgradcheck(masked, inputs)


@pytest.mark.parametrize("shape", [(3, 4), (5,), (2, 3, 4)])
def test_the_dual_is_two_products_with_one_mask(shape):
    f, u, f_dot = make(shape)
    inputs = tuple(part.requires_grad_() for part in (f, f_dot, u))
    got, want = reweight_dual(*inputs), (reweight_features(f, u), reweight_features(f_dot, u))
    torch.testing.assert_close(got, want, rtol=1e-15, atol=0)
    assert gradcheck(reweight_dual, inputs, check_forward_ad=True)
    assert gradgradcheck(reweight_dual, inputs)


@pytest.mark.parametrize("masked", [False, True])
def test_closed_form_gradients(masked):
    f, u, f_dot = make((3, 4))
    inputs = f, f_dot, u = tuple(part.requires_grad_() for part in (f, f_dot, u))
    above = tuple(torch.randn((3, 4), generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (1, 2))
    want = grad(reweight_dual(*inputs), inputs, above)
    given = reweight_features(f, u) if masked else f
    if masked:  # f is overwritten in place only where there is no ḟ
        want = grad(reweight_features(f, u), (f, u), above[0])
        got = reference.gradients(above[0], None, given, None, u, masked=True)
        got = got[0], got[2]
    else:
        got = reference.gradients(*above, f, f_dot, u)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32, torch.float32), (torch.bfloat16,) * 3, (torch.float64,) * 3]
)
def test_the_dual_is_taken_in_the_widest_dtype(dtypes):
    f, u, f_dot = make((3, 4))
    parts = [part.to(dtype) for part, dtype in zip((f, f_dot, u), dtypes, strict=True)]
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    assert [part.dtype for part in reweight_dual(*parts)] == [wide, wide]


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
