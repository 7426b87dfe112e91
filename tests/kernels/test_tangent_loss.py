"""The tangent loss's reference: it is the derivative of the loss that it says it is."""

import pytest
import torch
from torch.autograd import forward_ad, grad, gradcheck, gradgradcheck

from fastadvisor_kernels import mes_cross_entropy, tangent_loss
from fastadvisor_kernels.tangent_loss import reference
from tests.kernels.cases import BETAS, make, make_beta

OPTIONS = [{}, {"reduction": "mean", "label_smoothing": 0.3}, {"reduction": "sum", "ignore_index": 2}]


def directions(batch, classes, seed=7):
    z_dot, v_dot, _ = make(batch, classes, seed=seed)
    return z_dot, v_dot


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", BETAS)
@pytest.mark.parametrize("moves", [False, True], ids=["v stays", "v moves"])
def test_it_is_the_derivative_of_the_loss_along_the_direction(kind, options, moves):
    z, v, y = make(6, 5)
    y[0] = options.get("ignore_index", -100)
    beta = make_beta(kind, 6, 5)
    z_dot, v_dot = directions(6, 5)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(v, v_dot) if moves else v
        loss = mes_cross_entropy(forward_ad.make_dual(z, z_dot), dual, y, beta, **options)
        expected = forward_ad.unpack_dual(loss).tangent
    got = tangent_loss(z, z_dot, v, y, beta, v_dot if moves else None, **options)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_without_weights():
    z, _, y = make(6, 5)
    z_dot, _ = directions(6, 5)
    with forward_ad.dual_level():
        loss = mes_cross_entropy(forward_ad.make_dual(z, z_dot), None, y)
        expected = forward_ad.unpack_dual(loss).tangent
    torch.testing.assert_close(tangent_loss(z, z_dot, None, y), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", BETAS)
@pytest.mark.parametrize("moves", [False, True], ids=["v stays", "v moves"])
def test_gradcheck(kind, options, moves):
    z, v, y = make(3, 4)
    beta = make_beta(kind, 3, 4)
    z_dot, v_dot = directions(3, 4)
    inputs = [part.requires_grad_() for part in ((z, z_dot, v, v_dot) if moves else (z, z_dot, v))]

    def loss(z, z_dot, v, v_dot=None):
        return tangent_loss(z, z_dot, v, y, beta, v_dot, **options)

    assert gradcheck(loss, inputs, check_forward_ad=True)
    assert gradgradcheck(loss, inputs)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", [*BETAS, "v is None"])
@pytest.mark.parametrize("moves", [False, True], ids=["v stays", "v moves"])
def test_the_closed_form_is_the_gradient_and_has_one_itself(kind, options, moves):
    z, v, y = make(4, 5)
    y[1] = options.get("ignore_index", -100)
    z_dot, v_dot = directions(4, 5)
    if kind == "v is None":
        v, v_dot, beta = None, None, None
    else:
        beta, v_dot = make_beta(kind, 4, 5), v_dot if moves else None
    inputs = [part.requires_grad_() for part in (z, z_dot, v, v_dot) if part is not None]
    loss = tangent_loss(z, z_dot, v, y, beta, v_dot, **options)
    above = torch.linspace(0.5, 2.0, loss.numel(), dtype=torch.float64).reshape(loss.shape).requires_grad_()
    by_autograd = grad(loss, inputs, above, create_graph=True)
    closed = tuple(part for part in reference.gradients(above, z, z_dot, v, v_dot, y, beta, **options) if part is not None)
    torch.testing.assert_close(closed, by_autograd, rtol=1e-12, atol=1e-14)
    second = [
        grad([part.square().sum() for part in first], (*inputs, above), retain_graph=True) for first in (closed, by_autograd)
    ]
    torch.testing.assert_close(*second, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"z_dot": (3, 5)}, "ż"),
        ({"v_dot": (1, 4)}, "v̇"),
        ({"v": None, "v_dot": (3, 4)}, "give v too"),
        ({"v": (3, 5)}, "Expected z"),
        ({"z": (4, 4)}, "Expected z"),
    ],
)
def test_wrong_shapes(change, sentence):
    shapes = {"z": (3, 4), "z_dot": (3, 4), "v": (3, 4), "v_dot": None, **change}
    z, z_dot, v, v_dot = (None if shape is None else torch.zeros(shape) for shape in shapes.values())
    with pytest.raises(ValueError, match=sentence):
        tangent_loss(z, z_dot, v, torch.zeros(3, dtype=torch.long), None, v_dot)


def test_wrong_options():
    z, v, y = make(3, 4)
    with pytest.raises(ValueError, match="beta must lie in"):
        tangent_loss(z, z, v, y, 1.5)
    with pytest.raises(ValueError, match="none, mean or sum"):
        tangent_loss(z, z, v, y, reduction="median")
