"""Synchronised batch normalisation of one process against torch's own (several: tests/distributed)."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from fastadvisor.metagrad.tangent import Tangents
from fastadvisor.models.sync_batch_norm import separate, statistics, synchronise
from fastadvisor.runtime.ranks import ALONE

CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def layers(affine, shape):
    torch.manual_seed(0)
    layer = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](shape[1], affine=affine).double()
    if affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    other = nn.Sequential(layer.__class__(shape[1], affine=affine).double())
    other[0].load_state_dict(layer.state_dict())
    synchronise(other, ALONE)
    return layer, other


def distance(got, expected):
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(16, 3), (8, 3, 7), (8, 3, 5, 5)], ids=str)
def test_it_is_torchs_batch_norm(shape, affine, dtype):
    plain, ours = layers(affine, shape)
    if dtype is not torch.float64:  # parameters stay in float32, as under autocast
        ours.float()
    x = 3 * torch.randn(shape, dtype=torch.float64) + 2
    pull = torch.randn(shape, dtype=torch.float64)
    ends = []
    for layer, given in ((plain, x), (ours, x.to(dtype))):
        given = given.clone().requires_grad_()
        y = layer(given)
        (y * pull.to(y.dtype)).sum().backward()
        ends.append([y, given.grad, *(parameter.grad for parameter in layer.parameters()), *layer.buffers()])
    for expected, got in zip(*ends, strict=True):
        assert distance(got, expected) <= CLOSE[dtype] or float((got - expected).detach().abs().max()) <= CLOSE[dtype]
    assert ends[1][0].dtype == ends[1][1].dtype == dtype


@pytest.mark.parametrize("moving", ["input", "parameters", "both"])
@pytest.mark.parametrize("shape", [(16, 3), (8, 3, 5, 5)], ids=str)
def test_its_tangent_is_torchs(shape, moving):
    plain, ours = layers(True, shape)
    x, x_dot = torch.randn(2, *shape, dtype=torch.float64)
    dots = {name: torch.randn_like(parameter) for name, parameter in plain.named_parameters()}
    found = []
    for layer, rule in ((plain, None), (ours[0], Tangents())):
        with torch.no_grad(), forward_ad.dual_level():
            given = {
                name: forward_ad.make_dual(parameter.detach(), dots[name]) if moving != "input" else parameter
                for name, parameter in layer.named_parameters()
            }
            entering = forward_ad.make_dual(x, x_dot) if moving != "parameters" else x
            if rule is None:
                y = torch.func.functional_call(layer, given, (entering,))
            else:
                with rule:
                    y = torch.func.functional_call(layer, given, (entering,))
            found.append(forward_ad.unpack_dual(y))
    for expected, got in zip(*found, strict=True):
        assert distance(got, expected) <= 1e-12


def test_a_large_mean_costs_no_digits():
    x = torch.randn(64, 5, 8, 8) + torch.tensor([0.0, 10.0, 100.0, 1000.0, 1e4]).reshape(1, 5, 1, 1)
    mean, var, count = statistics(x, ALONE)
    torch.testing.assert_close(mean, x.double().mean((0, 2, 3)).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var, x.double().var((0, 2, 3), correction=0).float(), rtol=1e-5, atol=0)
    assert count == 64 * 64


def test_separate_gives_the_layer_back():
    plain, ours = layers(True, (4, 3))
    separate(ours)
    assert type(ours[0]) is type(plain)
    assert ours[0].__dict__.keys() == plain.__dict__.keys()
