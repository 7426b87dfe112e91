"""The rules of the tangent pass against torch's own dual numbers, and what the tape may and may not spare."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from fastadvisor.metagrad import ForwardEngine, ReferenceEngine
from fastadvisor.metagrad.tangent import Recording, Tangents, Tape, _statistics, product, weight_norm
from fastadvisor.models import cut_at
from tests.metagrad.problem import CLASSES, NETWORKS, SIZE, flat, plain, problem, relative


def dual(*shape, generator):
    return forward_ad.make_dual(*(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)))


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (6, 4, 3, 2), (3, 4, 2, 3, 2)])
@pytest.mark.parametrize("frozen", [None, "weight", "bias", "both"])
def test_batch_norm_equals_dual_numbers(shape, frozen):
    results = []
    for mode in (nullcontext(), Tangents()):
        generator = torch.Generator().manual_seed(0)
        with forward_ad.dual_level():
            x, weight, bias = (dual(*s, generator=generator) for s in (shape, shape[1:2], shape[1:2]))
            if frozen in ("weight", "both"):
                weight = forward_ad.unpack_dual(weight).primal
            if frozen in ("bias", "both"):
                bias = forward_ad.unpack_dual(bias).primal
            with mode:
                y = F.batch_norm(x, None, None, weight, bias, True, 0.1, 1e-3)
            results.append(forward_ad.unpack_dual(y))
    for got, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"stride": 2, "padding": 1}, {"groups": 2}, {"dilation": 2}])
@pytest.mark.parametrize("constant", ["none", "x", "w", "b", "all"])
def test_convolution_equals_dual_numbers(settings, constant):
    results = []
    for mode in (nullcontext(), Tangents()):
        generator = torch.Generator().manual_seed(0)
        with forward_ad.dual_level():
            parts = {"x": dual(2, 4, 7, 7, generator=generator)}
            parts["w"] = dual(6, 4 // settings.get("groups", 1), 3, 3, generator=generator)
            parts["b"] = dual(6, generator=generator)
            for name in parts if constant == "all" else [constant]:
                if name in parts:
                    parts[name] = forward_ad.unpack_dual(parts[name]).primal
            with mode:
                y = F.conv2d(*parts.values(), **settings)
            results.append(forward_ad.unpack_dual(y))
    expected, got = results
    torch.testing.assert_close(got.primal, expected.primal)
    assert (got.tangent is None) == (expected.tangent is None) == (constant == "all")
    if got.tangent is not None:
        torch.testing.assert_close(got.tangent, expected.tangent, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [-1, 0, 1, 3])
def test_weight_norm_is_torchs(dim):
    v = torch.randn(6, 4, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g = 1 + torch.norm_except_dim(v, 2, dim)
    torch.testing.assert_close(weight_norm(v, g, dim), torch._weight_norm(v, g, dim))


@pytest.fixture
def spared(monkeypatch):
    """For each product of a tangent pass, in order, whether its primal output came from the tape."""
    calls = []

    def watched(function, known, *args, **settings):
        calls.append(bool(known))
        return product(function, known, *args, **settings)

    monkeypatch.setattr("fastadvisor.metagrad.tangent.product", watched)
    return calls


def test_no_convolution_of_the_shared_pass_is_computed_again(spared):
    problem().gradient(ForwardEngine(plain))
    assert spared == [True] * 7


@pytest.mark.parametrize("behind", [False, True])
def test_a_cut_spares_only_what_is_above_it(spared, behind):
    task = problem()
    engine = ForwardEngine(plain, cut_at(task.model, (SIZE, SIZE), 1))
    posed = task.posed(engine, behind=behind)
    assert [len(kept.values) > 0 for kept in posed.shared.tape.kept] == [False] * 10 + [True] * 4  # convolution, norm, …
    got = engine.meta_gradient(posed, engine.virtual_train(posed), task.meta)
    assert spared == [True] * 2
    posed.shared.tape = None
    again = engine.meta_gradient(posed, engine.virtual_train(posed), task.meta)
    assert relative(got.gradients, again.gradients) <= 1e-12


def test_an_output_overwritten_in_place_is_computed_again_and_the_gradient_stays_exact(spared):
    NETWORKS["in-place"] = lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(inplace=True),  # on the convolution's own output
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )
    try:
        task = problem(network="in-place")
    finally:
        del NETWORKS["in-place"]
    got = task.gradient(ForwardEngine(plain))
    assert spared == [False, True]
    assert relative(got.gradients, task.gradient(ReferenceEngine(plain)).gradients) <= 1e-12


def test_a_compiled_backbone_is_exact():
    task = problem(network="batchnorm")
    expected = task.gradient(ReferenceEngine(plain)).gradients
    task.model.model.compile(backend="aot_eager")
    assert task.model.compiled
    got = task.gradient(ForwardEngine(plain)).gradients
    assert relative(got, expected) <= 1e-12
    assert flat(got).norm() > 0


def test_the_tape_forgets_what_does_not_fit():
    tape = Tape()
    with Recording(tape):
        y = F.linear(torch.ones(2, 3), torch.ones(4, 3))
        F.relu(y)
    assert len(tape) == 1
    assert torch.equal(tape.find(0, F.linear)[0], y)
    assert tape.find(0, F.conv2d) == ()
    assert tape.find(1, F.linear) == ()
    y.add_(1)
    assert tape.find(0, F.linear) == ()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_statistics_of_a_graph_are_those_of_the_batch(dtype):
    """Read off torch's own node: should a later torch name them otherwise, this says so, and they are computed again."""
    x = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(0)).mul(3).add(1).to(dtype)
    weight, bias = torch.ones(4, requires_grad=True), torch.zeros(4)
    if dtype == torch.float64:
        weight, bias = weight.detach().double().requires_grad_(), bias.double()
    tape = Tape()
    with Recording(tape):
        F.batch_norm(x, None, None, weight, bias, True, 0.1, 1e-3)
    mean, inverse = tape.find(0, F.batch_norm)
    expected_mean, expected_inverse = _statistics(x, 1e-3)
    torch.testing.assert_close(mean, expected_mean.to(mean.dtype))
    torch.testing.assert_close(inverse, expected_inverse.to(mean.dtype))


@pytest.mark.parametrize("offset", [0, 3, 30])
def test_batch_norm_in_bfloat16_with_a_mean_far_from_zero(offset):
    """The slope in x and the shift cancel but for x̂: rounded apart, they would not."""
    generator = torch.Generator().manual_seed(0)
    x, x_dot = (torch.randn(16, 4, 6, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    x = (x + offset).bfloat16()
    x_dot = x_dot.bfloat16()
    weight, weight_dot, bias, bias_dot = torch.randn(4, 4, generator=generator)
    tangents = []
    for dtype, affine, mode in ((torch.float64, torch.float64, nullcontext()), (torch.bfloat16, torch.float32, Tangents())):
        with forward_ad.dual_level(), mode:
            inputs = forward_ad.make_dual(x.to(dtype), x_dot.to(dtype))
            pairs = ((weight, weight_dot), (bias, bias_dot))
            parameters = [forward_ad.make_dual(value.to(affine), dot.to(affine)) for value, dot in pairs]
            tangents.append(forward_ad.unpack_dual(F.batch_norm(inputs, None, None, *parameters, True)).tangent.double())
    assert float((tangents[1] - tangents[0]).norm() / tangents[0].norm()) < 0.01
