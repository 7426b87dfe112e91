import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn.functional import cross_entropy

import fastadvisor_kernels
from fastadvisor_kernels import mes_cross_entropy
from fastadvisor_kernels.equalization_softmax import log_weights, reference
from tests.kernels.cases import BETAS, CLASSES, DTYPES, LAYOUTS, MARGIN, as_number, make, make_beta


def truth(z, v, y, beta):
    """Eq. 4 to 8 as written, in float64, with its gradients by autograd: for moderate inputs."""
    z, v = z.detach().double().requires_grad_(), v.detach().double().requires_grad_()
    w = 1 - as_number(beta, *z.shape) * torch.sigmoid(v)
    w = w.scatter(1, y[:, None], 1.0)
    e = z.exp()
    loss = -torch.log(e.gather(1, y[:, None]).squeeze(1) / (w * e).sum(1))
    return loss.detach(), *grad(loss.sum(), (z, v))


def run(z, v, y, beta):
    z, v = z.detach().requires_grad_(), v.detach().requires_grad_()
    loss = mes_cross_entropy(z, v, y, beta)
    return loss.detach(), *grad(loss.sum(), (z, v))


@pytest.mark.parametrize("kind", BETAS)
def test_gradcheck(kind):
    z, v, y = make(3, 4)
    beta = make_beta(kind, 3, 4)

    def loss(z, v):
        return mes_cross_entropy(z, v, y, beta)

    inputs = (z.requires_grad_(), v.requires_grad_())
    assert gradcheck(loss, inputs, check_forward_ad=True)
    assert gradgradcheck(loss, inputs)


def test_gradcheck_without_weights():
    z, _, y = make(3, 4)
    z.requires_grad_()
    assert gradcheck(lambda z: mes_cross_entropy(z, None, y), (z,), check_forward_ad=True)
    assert gradgradcheck(lambda z: mes_cross_entropy(z, None, y), (z,))


@pytest.mark.parametrize("kind", BETAS)
@pytest.mark.parametrize("v_dtype", DTYPES)
@pytest.mark.parametrize("z_dtype", DTYPES)
def test_error_rule(z_dtype, v_dtype, kind):
    z, v, y = make(33, 14, z_dtype, v_dtype)
    beta = make_beta(kind, 33, 14)
    want = truth(z, v, y, beta)
    got = run(z, v, y, beta)
    assert [t.dtype for t in got] == [torch.float32, z_dtype, v_dtype]
    # The loss itself is computed in float32 from whatever dtype comes in.
    for value, expected, dtype in zip(got, want, [torch.float32, z_dtype, v_dtype], strict=True):
        assert (value.double() - expected).abs().max() <= MARGIN[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_rule_without_weights(dtype):
    z, v, y = make(33, 14, dtype)
    want, z_want, _ = truth(z, v, y, 0.0)
    z.requires_grad_()
    loss = mes_cross_entropy(z, None, y)
    (z_grad,) = grad(loss.sum(), z)
    assert (loss.dtype, z_grad.dtype) == (torch.float32, dtype)
    assert (loss.double() - want).abs().max() <= MARGIN[torch.float32]
    assert (z_grad.double() - z_want).abs().max() <= MARGIN[dtype]


@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16, torch.float64])
def test_float64_wherever_an_input_is_float64(other):
    z, v, y = make(5, 3, torch.float64, other)
    assert mes_cross_entropy(z, v, y).dtype is torch.float64
    z, v, y = make(5, 3, other, torch.float64)
    loss = mes_cross_entropy(z, v, y, 0.9)
    assert loss.dtype is torch.float64
    torch.testing.assert_close(loss, truth(z, v, y, 0.9)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", BETAS)
def test_values_and_gradients_in_float64(kind):
    z, v, y = make(7, 10)
    beta = make_beta(kind, 7, 10)
    torch.testing.assert_close(run(z, v, y, beta), truth(z, v, y, beta), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", BETAS)
def test_closed_form_gradients_of_the_readme(kind):
    z, v, y = make(7, 10, seed=3)
    beta = make_beta(kind, 7, 10)
    b = as_number(beta, *z.shape)
    s = torch.sigmoid(v)
    other = torch.ones_like(z).scatter(1, y[:, None], 0.0)
    p = torch.softmax(z + log_weights(v, y, beta), dim=1)
    fractional = isinstance(b, float) and 0 < b < 1
    slope = -b * s * (1 - s) / (1 - b * s) if fractional else -b * s
    _, z_grad, v_grad = run(z, v, y, beta)
    torch.testing.assert_close(z_grad, p - (1 - other), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(v_grad, p * slope * other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", BETAS)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("batch", [1, 7])
def test_extremes_stay_finite(batch, classes, kind):
    generator = torch.Generator().manual_seed(classes)
    y = torch.randint(classes, (batch,), generator=generator)
    beta = make_beta(kind, batch, classes)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        signs = torch.randint(0, 2, (2, batch, classes), generator=generator) * 2.0 - 1
        ones = torch.ones(batch, classes)
        for z, v in [(signs[0], signs[1]), (ones, ones), (-ones, ones), (ones, -ones), (signs[0], 0 * ones), (0 * ones, ones)]:
            loss, z_grad, v_grad = run((1e4 * z).to(dtype), (1e4 * v).to(dtype), y, beta)
            assert loss.isfinite().all()
            assert (loss >= 0).all()
            assert z_grad.isfinite().all()
            assert v_grad.isfinite().all()


@pytest.mark.parametrize("beta", [None, 1.0, 0.9, 0.999, 0.9999999, 1 - 1e-9, 1 - 1e-15])
def test_saturated_sigmoid_stays_finite(beta):
    v = torch.tensor([[1e4, 1e4, 30.0], [100.0, 17.0, 1e4]])
    if beta is None:
        assert torch.log(1 - torch.sigmoid(v)).isneginf().all()  # what the naive formula gives
    a = log_weights(v, torch.tensor([2, 0]), beta)
    assert a.isfinite().all()
    for dtype in (torch.float32, torch.bfloat16):
        loss, z_grad, v_grad = run(torch.zeros(2, 3), v.to(dtype), torch.tensor([2, 0]), beta)
        assert loss.isfinite().all()
        assert z_grad.isfinite().all()
        assert v_grad.isfinite().all()


def test_log_weights_keep_the_whole_tail():
    v = torch.tensor([[1e4, 50.0, -50.0]])
    torch.testing.assert_close(log_weights(v, torch.tensor([2])), torch.tensor([[-1e4, -50.0, 0.0]]))
    assert torch.equal(log_weights(v, torch.tensor([0]))[:, 0], torch.zeros(1))


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("kind", ["v is None", 0.0, "zeros per sample", "zeros per class"])
def test_beta_zero_is_plain_cross_entropy(kind, classes):
    z, v, y = make(5, classes, torch.float32)
    beta = {"v is None": None, 0.0: 0.0, "zeros per sample": torch.zeros(5, 1), "zeros per class": torch.zeros(5, classes)}[
        kind
    ]
    z.requires_grad_()
    v.requires_grad_()
    loss = mes_cross_entropy(z, None if kind == "v is None" else v, y, beta)
    plain = cross_entropy(z, y, reduction="none")
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(grad(loss.sum(), z, retain_graph=True)[0], grad(plain.sum(), z)[0], rtol=1e-5, atol=1e-6)
    if kind != "v is None":
        assert torch.equal(grad(loss.sum(), v)[0], torch.zeros_like(v))


@pytest.mark.parametrize("kind", BETAS)
def test_layout_does_not_matter(kind):
    z, v, y = make(7, 10, torch.float32)
    beta = make_beta(kind, 7, 10)
    want = run(z, v, y, beta)

    long_y = y.repeat_interleave(2)[::2]
    for of_z in LAYOUTS:
        for of_v in LAYOUTS:
            assert not of_z(z).is_contiguous()
            torch.testing.assert_close(run(of_z(z), of_v(v), long_y, beta), want, rtol=1e-5, atol=1e-6)


OPTIONS = [
    {"reduction": "mean"},
    {"reduction": "sum", "label_smoothing": 0.2},
    {"reduction": "mean", "label_smoothing": 1.0, "ignore_index": 3},
    {"ignore_index": 0},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("plain", ["v is None", "β = 0"])
def test_options_are_those_of_torchs_cross_entropy(options, plain):
    z, v, y = make(9, 5, torch.float32)
    y[::4] = options.get("ignore_index", -100)
    z.requires_grad_()
    got = mes_cross_entropy(z, None if plain == "v is None" else v, y, 0.0, **options)
    want = cross_entropy(z, y, **{"reduction": "none", **options})
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(grad(got.sum(), z)[0], grad(want.sum(), z)[0], rtol=1e-5, atol=1e-6)


def test_the_mean_of_nothing_is_nan_and_its_sum_zero():
    z, v, _ = make(3, 5)
    y = torch.full((3,), -100)
    assert mes_cross_entropy(z, v, y, reduction="mean").isnan()
    assert mes_cross_entropy(z, v, y, reduction="sum") == 0


@pytest.mark.parametrize("kind", BETAS)
@pytest.mark.parametrize("options", [{}, *OPTIONS])
def test_the_closed_form_is_the_gradient_and_has_one_itself(options, kind):
    z, v, y = make(4, 5)
    y[0] = options.get("ignore_index", -100)
    beta = make_beta(kind, 4, 5)
    z.requires_grad_()
    v.requires_grad_()
    loss = mes_cross_entropy(z, v, y, beta, **options)
    above = torch.linspace(0.5, 2.0, loss.numel(), dtype=torch.float64).reshape(loss.shape).requires_grad_()
    by_autograd = grad(loss, (z, v), above, create_graph=True)
    closed = reference.gradients(above, z, v, y, beta, **options)
    torch.testing.assert_close(closed, by_autograd, rtol=1e-12, atol=1e-14)
    second = [
        grad([part.square().sum() for part in first], (z, v, above), retain_graph=True) for first in (closed, by_autograd)
    ]
    torch.testing.assert_close(*second, rtol=1e-10, atol=1e-13)


def test_targets_of_any_integer_type():
    z, v, y = make(5, 4)
    assert torch.equal(mes_cross_entropy(z, v, y.int()), mes_cross_entropy(z, v, y))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"reduction": "average"}, "none, mean or sum"), ({"label_smoothing": 1.5}, "label_smoothing must lie in")],
)
def test_wrong_options(options, sentence):
    z, v, y = make(3, 4)
    with pytest.raises(ValueError, match=sentence):
        mes_cross_entropy(z, v, y, **options)


def test_a_label_that_is_no_class_is_refused():
    z, v, _ = make(3, 4)
    with pytest.raises(RuntimeError, match="out of bounds"):
        mes_cross_entropy(z, v, torch.tensor([0, 4, 1]))


def test_inputs_are_left_alone():
    z, v, y = make(5, 4, torch.float32)
    kept = z.clone(), v.clone(), y.clone()
    run(z, v, y, None)
    assert all(torch.equal(a, b) for a, b in zip((z, v, y), kept, strict=True))


@pytest.mark.parametrize(
    ("z", "v", "y"),
    [
        ((3, 4), (3, 5), 3),
        ((3, 4), (1, 4), 3),
        ((3, 4), (3, 4), 2),
        ((3, 4), None, 4),
        ((12,), (12,), 1),
        ((3, 4, 1), (3, 4, 1), 3),
    ],
)
def test_wrong_shapes(z, v, y):
    with pytest.raises(ValueError, match="Expected z"):
        mes_cross_entropy(torch.zeros(z), None if v is None else torch.zeros(v), torch.zeros(y, dtype=torch.int64))


@pytest.mark.parametrize("beta", [-0.1, 1.1, 2, float("nan"), float("inf")])
def test_beta_out_of_range(beta):
    z, v, y = make(3, 4)
    with pytest.raises(ValueError, match="beta"):
        mes_cross_entropy(z, v, y, beta)
    with pytest.raises(ValueError, match="beta"):
        log_weights(v, y, beta)


@st.composite
def samples(draw):
    classes, batch = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    size = draw(st.sampled_from([0.1, 5.0, 100.0]))
    z, v, y = make(batch, classes, scale=size, seed=draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from([*BETAS, 0.5, 0.999]))
    return z, v, y, make_beta(kind, batch, classes, draw(st.integers(0, 2**31)))


properties = settings(max_examples=60, deadline=None)


@properties
@given(samples())
def test_between_zero_and_plain_cross_entropy(sample):
    z, v, y, beta = sample
    loss = mes_cross_entropy(z.float(), v.float(), y, beta)
    assert (loss >= 0).all()
    assert (loss <= cross_entropy(z.float(), y, reduction="none") * (1 + 1e-5) + 1e-5).all()


@properties
@given(samples(), st.integers(0, 2**31), st.sampled_from([0.1, 3.0, 1e3]))
def test_larger_v_never_raises_the_loss(sample, seed, size):
    z, v, y, beta = sample
    more = v + size * torch.rand(v.shape, generator=torch.Generator().manual_seed(seed), dtype=v.dtype)
    assert (mes_cross_entropy(z, more, y, beta) <= mes_cross_entropy(z, v, y, beta) + 1e-11).all()


@properties
@given(samples(), st.floats(-1e3, 1e3))
def test_a_shift_of_the_logits_changes_nothing(sample, shift):
    z, v, y, beta = sample
    torch.testing.assert_close(mes_cross_entropy(z + shift, v, y, beta), mes_cross_entropy(z, v, y, beta), rtol=1e-9, atol=1e-9)


@properties
@given(samples(), st.floats(-100, 100))
def test_the_weight_of_the_target_does_not_matter(sample, value):
    z, v, y, beta = sample
    other = v.scatter(1, y[:, None], value)
    assert torch.equal(mes_cross_entropy(z, v, y, beta), mes_cross_entropy(z, other, y, beta))


def test_the_package_needs_torch_alone():
    code = (
        "import sys, fastadvisor_kernels as k, torch\n"
        "k.mes_cross_entropy(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))\n"
        "k.reweight_features(torch.zeros(2, 3), torch.zeros(2, 3))\n"
        "bad = [m for m in sys.modules if m.split('.')[0] in ('fastadvisor', 'triton')]\n"
        "assert not bad, bad\n"
    )
    # -P leaves the working directory, and with it the source tree of fastadvisor, off the path.
    kernels = str(Path(fastadvisor_kernels.__file__).parents[1])
    command = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {kernels!r})\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shape", [(3,), (3, 3, 1), (1, 3), (2, 1)])
def test_a_beta_of_another_shape_is_refused_even_where_it_would_broadcast(shape):
    z = torch.zeros(3, 3)
    with pytest.raises(ValueError, match="beta must be"):
        mes_cross_entropy(z, z, torch.zeros(3, dtype=torch.long), torch.ones(shape))
