"""The Triton kernels of the tangent loss, against float64 and against the reference."""

import pytest
import torch
from torch.autograd import grad

from fastadvisor_kernels import backend, tangent_loss
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
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
MOVES = pytest.mark.parametrize("moves", [False, True], ids=["v stays", "v moves"])


def make_all(batch, classes, dtype, *, moves, scale=2.0):
    """z, ż, v, v̇ or None, y."""
    z, v, y = make(batch, classes, dtype, scale=scale, device=DEVICE)
    z_dot, v_dot, _ = make(batch, classes, dtype, seed=7, device=DEVICE)
    return z, z_dot, v, v_dot if moves else None, y


def run(name, z, z_dot, v, v_dot, y, beta=None, **options):
    z, z_dot, v, v_dot = (None if part is None else part.detach().requires_grad_() for part in (z, z_dot, v, v_dot))
    with backend(name):
        loss = tangent_loss(z, z_dot, v, y, beta, v_dot, **options)
        above = torch.linspace(-1.0, 2.0, loss.numel(), dtype=loss.dtype, device=loss.device).reshape(loss.shape)
        gradients = grad(loss, [part for part in (z, z_dot, v, v_dot) if part is not None], above)
    return loss.detach(), *gradients


def all_three(z, z_dot, v, v_dot, y, beta=None, **options):
    """By the kernel, by torch in the same dtypes, by torch in float64."""
    given = z, z_dot, v, v_dot
    wide = (None if part is None else part.double() for part in given)
    return (
        run("triton", *given, y, beta, **options),
        run("reference", *given, y, beta, **options),
        run("reference", *wide, y, beta, **options),
    )


@MOVES
@pytest.mark.parametrize("kind", BETAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_rule(dtype, kind, moves):
    assert_within_the_rule(*all_three(*make_all(9, 14, dtype, moves=moves), make_beta(kind, 9, 14, device=DEVICE)))


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32, torch.float32), (torch.float64, torch.bfloat16, torch.float16)]
)
def test_mixed_dtypes(dtypes):
    z, z_dot, v, v_dot, y = make_all(5, 14, torch.float64, moves=True)
    z, z_dot, v = (part.to(dtype) for part, dtype in zip((z, z_dot, v), dtypes, strict=True))
    assert_within_the_rule(*all_three(z, z_dot, v, v_dot.to(v.dtype), y))


@pytest.mark.parametrize("classes", [*CLASSES, *SEVERAL_TILES])
@pytest.mark.parametrize("batch", [1, 7])
def test_sizes(batch, classes):
    z, z_dot, v, v_dot, y = make_all(batch, classes, torch.float32, moves=True)
    assert_within_the_rule(*all_three(z, z_dot, v, v_dot, y, make_beta("drawn", batch, classes, device=DEVICE)))
    assert_within_the_rule(*all_three(z, z_dot, None, None, y))


@MOVES
@pytest.mark.parametrize("kind", BETAS)
@pytest.mark.parametrize("classes", [10, *SEVERAL_TILES])
def test_every_kind_of_beta_in_float64(classes, kind, moves):
    got, same, _ = all_three(*make_all(3, classes, torch.float64, moves=moves), make_beta(kind, 3, classes, device=DEVICE))
    torch.testing.assert_close(got, same, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "mean", "label_smoothing": 0.2},
        {"reduction": "sum", "ignore_index": 1},
        {"label_smoothing": 1.0, "ignore_index": 0},
    ],
)
@pytest.mark.parametrize("classes", [5, *SEVERAL_TILES])
def test_options(classes, options):
    z, z_dot, v, v_dot, y = make_all(6, classes, torch.float32, moves=True)
    y[::3] = options.get("ignore_index", -100)
    assert_within_the_rule(*all_three(z, z_dot, v, v_dot, y, 0.9, **options))
    got = run("triton", z, z_dot, v, v_dot, y, **options)
    assert all((part[::3] == 0).all() for part in got[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "classes"), [(1, 1), (7, 2), (3, 1023)])
def test_extremes_stay_finite(batch, classes, dtype):
    generator = torch.Generator().manual_seed(classes)
    y = torch.randint(classes, (batch,), generator=generator).to(DEVICE)
    z, z_dot, v, v_dot = (torch.randint(0, 2, (4, batch, classes), generator=generator).to(DEVICE) * 2.0 - 1) * 1e4
    z_dot, v_dot = z_dot / 1e3, v_dot / 1e3
    parts = [part.to(dtype) for part in (z, z_dot, v, v_dot)]
    for kind in ("none", 0.9, 1 - 1e-6, "per class"):
        got = run("triton", *parts, y, make_beta(kind, batch, classes, device=DEVICE))
        assert all(part.isfinite().all() for part in got)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_matter(layout):
    z, z_dot, v, v_dot, y = make_all(7, 10, torch.bfloat16, moves=True)
    want = run("triton", z, z_dot, v, v_dot, y)
    given = [z, z_dot, v, v_dot]
    for index in range(4):
        changed = [layout(part) if place == index else part for place, part in enumerate(given)]
        got = run("triton", *changed, y)
        assert_nearly_the_same(got, want)


@pytest.mark.parametrize("classes", [4, 4097])
def test_a_label_that_is_no_class_gives_nan(classes):
    z, z_dot, v, v_dot, y = make_all(4, classes, torch.float32, moves=True)
    y[1] = classes
    for part in run("triton", z, z_dot, v, v_dot, y):
        assert part[1].isnan().all()
        assert part[0].isfinite().all()


@pytest.mark.parametrize("classes", [3, 4097])
def test_only_what_is_wanted_is_computed(classes):
    z, z_dot, v, v_dot, y = make_all(5, classes, torch.float32, moves=True)
    want = run("triton", z, z_dot, v, v_dot, y)[1:]
    for index in range(4):
        parts = [part.detach().requires_grad_(place == index) for place, part in enumerate((z, z_dot, v, v_dot))]
        with backend("triton"):
            loss = tangent_loss(*parts[:3], y, None, parts[3])
        (got,) = grad(loss, parts[index], torch.linspace(-1.0, 2.0, 5, device=DEVICE))
        assert_same_bits([got], [want[index]])
