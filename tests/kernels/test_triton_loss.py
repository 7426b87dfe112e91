"""The Triton kernels of the loss, against float64 and against the reference: on a GPU where there is one, else interpreted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import grad

from fastadvisor_kernels import Bernoulli, backend, mes_cross_entropy, mes_cross_entropy_with_gradients
from fastadvisor_kernels.launch import Launch
from tests.kernels.cases import (
    BETAS,
    CLASSES,
    DEVICE,
    DTYPES,
    LAYOUTS,
    SEVERAL_TILES,
    assert_nearly_the_same,
    assert_same_bits,
    assert_within_the_rule,
    make,
    make_beta,
    strided,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def launched(monkeypatch):
    """The list that launches are put on from now."""
    seen, launch = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (seen.append(self), launch(self)))
    return seen


def run(name, z, v, y, beta=None, **options):
    """Loss and gradients under another upstream gradient for each sample."""
    z, v = z.detach().requires_grad_(), None if v is None else v.detach().requires_grad_()
    with backend(name):
        loss = mes_cross_entropy(z, v, y, beta, **options)
        above = torch.linspace(-1.0, 2.0, loss.numel(), dtype=loss.dtype, device=loss.device).reshape(loss.shape)
        gradients = grad(loss, [part for part in (z, v) if part is not None], above)
    return loss.detach(), *gradients


def all_three(z, v, y, beta=None, **options):
    """By the kernel, by torch in the same dtypes, by torch in float64."""
    wide = (z.double(), None if v is None else v.double(), y, beta)
    return (
        run("triton", z, v, y, beta, **options),
        run("reference", z, v, y, beta, **options),
        run("reference", *wide, **options),
    )


@pytest.mark.parametrize("kind", BETAS)
@pytest.mark.parametrize(("z_dtype", "v_dtype"), [(dtype, dtype) for dtype in DTYPES])
def test_error_rule(z_dtype, v_dtype, kind):
    z, v, y = make(9, 14, z_dtype, v_dtype, device=DEVICE)
    assert_within_the_rule(*all_three(z, v, y, make_beta(kind, 9, 14, device=DEVICE)))


@pytest.mark.parametrize("v_dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("z_dtype", [torch.float64, *DTYPES])
def test_mixed_dtypes(z_dtype, v_dtype):
    z, v, y = make(5, 14, z_dtype, v_dtype, device=DEVICE)
    assert_within_the_rule(*all_three(z, v, y))


@pytest.mark.parametrize("classes", [*CLASSES, *SEVERAL_TILES])
@pytest.mark.parametrize("batch", [1, 7])
def test_sizes(batch, classes):
    z, v, y = make(batch, classes, torch.float32, device=DEVICE)
    for kind in ("none", "drawn"):
        assert_within_the_rule(*all_three(z, v, y, make_beta(kind, batch, classes, device=DEVICE)))
    assert_within_the_rule(*all_three(z, None, y))


def test_a_million_classes():
    z, v, y = make(1, 2**20, torch.float32, device=DEVICE)
    assert_within_the_rule(*all_three(z, v, y, make_beta("drawn", 1, 2**20, device=DEVICE)))


@pytest.mark.parametrize("kind", BETAS)
@pytest.mark.parametrize("classes", [100, *SEVERAL_TILES])
def test_every_kind_of_beta_in_float64(classes, kind):
    z, v, y = make(3, classes, device=DEVICE)
    got, same, _ = all_three(z, v, y, make_beta(kind, 3, classes, device=DEVICE))
    torch.testing.assert_close(got, same, rtol=1e-12, atol=1e-13)


OPTIONS = [
    {"reduction": "mean"},
    {"reduction": "sum", "label_smoothing": 0.2},
    {"reduction": "mean", "label_smoothing": 1.0, "ignore_index": 3},
    {"label_smoothing": 0.1, "ignore_index": 0},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("classes", [5, *SEVERAL_TILES])
def test_options(classes, options):
    z, v, y = make(6, classes, torch.float32, device=DEVICE)
    y[::3] = options.get("ignore_index", -100)
    assert_within_the_rule(*all_three(z, v, y, 0.9, **options))
    assert_within_the_rule(*all_three(z, None, y, **options))
    got = run("triton", z, v, y, **options)
    if options.get("reduction", "none") == "none":
        assert (got[0][::3] == 0).all()
    assert (got[1][::3] == 0).all()
    assert (got[2][::3] == 0).all()


def test_a_mean_over_more_samples_than_a_block():
    z, v, y = make(2500, 3, torch.float32, device=DEVICE)
    y[::7] = -100
    assert_within_the_rule(*all_three(z, v, y, reduction="mean"))


def test_the_mean_of_nothing_is_nan_and_its_sum_zero():
    z, v, _ = make(3, 5, torch.float32, device=DEVICE)
    y = torch.full((3,), -100, device=DEVICE)
    with backend("triton"):
        assert mes_cross_entropy(z, v, y, reduction="mean").isnan()
        assert mes_cross_entropy(z, v, y, reduction="sum") == 0
        empty = mes_cross_entropy(z[:0], v[:0], y[:0])
    assert empty.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "classes"), [(1, 1), (7, 2), (3, 1023), (1, 4097)])
def test_extremes_stay_finite(batch, classes, dtype):
    generator = torch.Generator().manual_seed(classes)
    y = torch.randint(classes, (batch,), generator=generator).to(DEVICE)
    signs = torch.randint(0, 2, (2, batch, classes), generator=generator).to(DEVICE) * 2.0 - 1
    ones = torch.ones(batch, classes, device=DEVICE)
    for z, v, kind in [
        (signs[0], signs[1], "none"),
        (signs[0], signs[1], "per class"),
        (signs[1], signs[0], 0.9),
        (signs[0], ones, 1 - 1e-6),
        (ones, ones, "none"),
        (-ones, ones, 0.5),
        (ones, -ones, "none"),
        (0 * ones, ones, "drawn"),
        (signs[0], 0 * ones, 0.0),
    ]:
        z, v = (1e4 * z).to(dtype), (1e4 * v).to(dtype)
        beta = make_beta(kind, batch, classes, device=DEVICE)
        got = run("triton", z, v, y, beta)
        assert all(part.isfinite().all() for part in got)
        assert (got[0] >= 0).all()
        # At 1e4 a float32 holds three decimals: what is compared is relative.
        torch.testing.assert_close(got[0], run("reference", z, v, y, beta)[0], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("beta", [None, 1.0, 0.9, 0.999, 0.9999999, 1 - 1e-9, 1 - 1e-15])
def test_a_saturated_sigmoid(beta):
    v = torch.tensor([[1e4, 1e4, 30.0], [100.0, 17.0, 1e4]], device=DEVICE)
    z, y = torch.zeros(2, 3, device=DEVICE), torch.tensor([2, 0], device=DEVICE)
    assert_within_the_rule(*all_three(z, v, y, beta))


@pytest.mark.parametrize("classes", [1, 10, 1000, 4097])
@pytest.mark.parametrize("kind", ["v is None", 0.0, "zeros per sample", "zeros per class", "drawn with probability 0"])
def test_beta_zero_is_plain_cross_entropy(kind, classes):
    z, v, y = make(5, classes, torch.float32, device=DEVICE)
    beta = {
        "v is None": None,
        0.0: 0.0,
        "zeros per sample": torch.zeros(5, 1, device=DEVICE),
        "zeros per class": torch.zeros(5, classes, device=DEVICE),
        "drawn with probability 0": Bernoulli(0.0, torch.tensor(3, device=DEVICE)),
    }[kind]
    got = run("triton", z, None if kind == "v is None" else v, y, beta)
    torch.testing.assert_close(got[:2], run("reference", z, None, y), rtol=1e-5, atol=2e-6)
    if kind != "v is None":
        assert (got[2] == 0).all()


@pytest.mark.parametrize("of_v", LAYOUTS)
@pytest.mark.parametrize("of_z", LAYOUTS)
def test_layout_does_not_matter(of_z, of_v):
    z, v, y = make(7, 10, torch.bfloat16, device=DEVICE)
    beta = make_beta("per class", 7, 10, device=DEVICE)
    long_y = y.repeat_interleave(2)[::2]
    want = run("triton", z, v, y, beta)
    assert not of_z(z).is_contiguous()
    got = run("triton", of_z(z), of_v(v), long_y, strided(beta))
    assert_nearly_the_same(got, want)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["per sample", "per class", "batch"])
def test_a_mask_of_any_dtype(kind, dtype):
    z, v, y = make(5, 6, torch.float32, device=DEVICE)
    beta = make_beta(kind, 5, 6, device=DEVICE)
    got, want = run("triton", z, v, y, beta.to(dtype)), run("triton", z, v, y, beta)
    assert_nearly_the_same(got, want)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("ignored", [-100, 255, 2])
def test_targets_of_any_integer_type(dtype, ignored):
    z, v, y = make(5, 4, torch.float32, device=DEVICE)
    y[1] = 2
    for reduction in ("none", "mean"):
        options = {"reduction": reduction, "ignore_index": ignored}
        assert_nearly_the_same(run("triton", z, v, y.to(dtype), **options), run("reference", z, v, y, **options))


@pytest.mark.parametrize("classes", [4, 4097])
def test_a_label_that_is_no_class_is_not_mistaken_for_one(classes):
    z, v, y = make(4, classes, torch.float32, device=DEVICE)
    right = run("triton", z, v, y)
    wrong = y.clone()
    wrong[1], wrong[2] = classes, -1
    loss, z_grad, v_grad = run("triton", z, v, wrong)
    for part in (loss[1:3], z_grad[1:3], v_grad[1:3]):
        assert part.isnan().all()
    for part, whole in zip((loss, z_grad, v_grad), right, strict=True):
        assert_nearly_the_same([part[::3]], [whole[::3]])


@pytest.fixture
def poisoned(monkeypatch):
    """Every tensor that is allocated without a value holds NaN."""
    allocate = torch.Tensor.new_empty
    count = []

    def filled(self, *args, **kwargs):
        tensor = allocate(self, *args, **kwargs)
        count.append(tensor)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor  # the interpreter allocates as well

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)
    yield
    assert count, "nothing was allocated: the test looks at nothing"


@pytest.mark.parametrize(("batch", "classes"), [(1, 1), (9, 3), (3, 1000), (5, 1023), (2, 9000)])
def test_every_element_is_written(batch, classes, poisoned):
    z, v, y = make(batch, classes, torch.float32, device=DEVICE)
    for reduction in ("none", "mean"):
        assert all(part.isfinite().all() for part in run("triton", z, v, y, reduction=reduction))
    with backend("triton"):
        assert all(part.isfinite().all() for part in mes_cross_entropy_with_gradients(z, v, y))


@pytest.mark.parametrize("classes", [10, *SEVERAL_TILES])
def test_the_same_bits_at_every_run(classes):
    z, v, y = make(5, classes, torch.float32, device=DEVICE)
    beta = make_beta("drawn", 5, classes, device=DEVICE)
    first, second = (run("triton", z, v, y, beta, reduction="mean") for _ in range(2))
    assert_same_bits(first, second)


@pytest.mark.parametrize("name", ["reference", "triton"])
@pytest.mark.parametrize("classes", [10, 1000, 4097])
def test_with_gradients_is_the_loss_and_its_gradients(classes, name):
    z, v, y = make(5, classes, torch.float32, device=DEVICE)
    y[0] = -100
    above = torch.linspace(-1.0, 2.0, 5, device=DEVICE)
    want = run("reference", z, v, y, 0.9, label_smoothing=0.1)
    with backend(name):
        got = mes_cross_entropy_with_gradients(z, v, y, 0.9, above, label_smoothing=0.1)
        ones = mes_cross_entropy_with_gradients(z, v, y, 0.9, label_smoothing=0.1, of_v=False)
        assert mes_cross_entropy_with_gradients(z, None, y)[2] is None
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert ones[2] is None
    torch.testing.assert_close(ones[1] * above[:, None], want[1], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="Expected grad"):
        mes_cross_entropy_with_gradients(z, v, y, grad_B=above[:3])


def test_only_what_is_wanted_is_computed(monkeypatch):
    z, v, y = make(5, 4, torch.float32, device=DEVICE)
    seen = launched(monkeypatch)
    for of_z, of_v in ((True, False), (False, True), (True, True)):
        z, v = z.detach().requires_grad_(of_z), v.detach().requires_grad_(of_v)
        seen.clear()
        with backend("triton"):
            mes_cross_entropy(z, v, y).sum().backward()
        forward, back = seen
        assert forward.arguments["z_grad_ptr"] is None
        assert (back.arguments["z_grad_ptr"] is not None, back.arguments["v_grad_ptr"] is not None) == (of_z, of_v)


@pytest.mark.parametrize(("classes", "forward"), [(10, 1), (1000, 1), (4096, 1), (4097, 2)])
def test_the_number_of_launches(classes, forward, monkeypatch):
    z, v, y = make(3, classes, torch.float32, device=DEVICE)
    z.requires_grad_()
    v.requires_grad_()
    seen = launched(monkeypatch)
    counts = []
    with backend("triton"), torch.profiler.profile() as profile:
        loss = mes_cross_entropy(z, v, y)
        counts.append(len(seen))
        loss.backward(torch.ones_like(loss))
        counts.append(len(seen))
        mes_cross_entropy_with_gradients(z, v, y)
        counts.append(len(seen))
        mes_cross_entropy(z, v, y, reduction="mean")
        counts.append(len(seen))
    assert counts == [forward, forward + 1, forward + 2 + 2 * (forward - 1), 2 * forward + 3 + 2 * (forward - 1)]
    assert not {event.key for event in profile.key_averages()} & {"aten::zeros", "aten::zeros_like", "aten::mul"}


def test_thirty_steps_of_training_by_either():
    """Logits of a linear classifier, v of a linear advisor, both trained: fused and reference end at the same weights."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 8, generator=generator).to(DEVICE)
    y = torch.randint(6, (16,), generator=generator).to(DEVICE)
    start = [0.3 * torch.randn(8, 6, generator=generator) for _ in range(2)]
    ends = {}
    for name in ("reference", "triton"):
        weights = [part.clone().to(DEVICE).requires_grad_() for part in start]
        optimizer = torch.optim.SGD(weights, lr=0.5, momentum=0.9)
        losses = []
        for step in range(30):
            with backend(name):
                beta = Bernoulli(0.9, torch.tensor(step, device=DEVICE))
                loss = mes_cross_entropy(x @ weights[0], x @ weights[1], y, beta, reduction="mean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.3 * losses[0]
        ends[name] = [part.detach() for part in weights], losses
    torch.testing.assert_close(ends["triton"], ends["reference"], rtol=1e-3, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 9),
    st.sampled_from([0.1, 5.0, 100.0]),
    st.sampled_from(BETAS),
    st.integers(0, 2**31),
    st.floats(-50, 50),
)
def test_properties(classes, batch, scale, kind, seed, shift):
    """Between 0 and plain cross-entropy; no larger for a larger v; the same for shifted logits, whatever the target's v."""
    z, v, y = make(batch, classes, torch.float32, scale=scale, seed=seed, device=DEVICE)
    beta = make_beta(kind, batch, classes, device=DEVICE)
    with backend("triton"):
        loss = mes_cross_entropy(z, v, y, beta)
        plain = mes_cross_entropy(z, None, y)
        more = mes_cross_entropy(z, v + scale, y, beta)
        shifted = mes_cross_entropy(z + shift, v, y, beta)
        other = mes_cross_entropy(z, v.scatter(1, y[:, None], shift), y, beta)
    tolerance = 1e-5 * (1 + float(z.abs().max()) + abs(shift))
    assert (loss >= 0).all()
    assert (loss <= plain + tolerance).all()
    assert (more <= loss + tolerance).all()
    assert (shifted - loss).abs().max() <= tolerance
    assert_same_bits([other], [loss])
