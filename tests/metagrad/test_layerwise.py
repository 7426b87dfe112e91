"""The approximations: each is exactly the sum over the layers it counts, and the samplers learn what they are said to learn."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cosine_similarity, cross_entropy

from fastadvisor.metagrad import ForwardEngine, GradientSamplers, LayerwiseEngine, LearnedLayers, ReferenceEngine
from fastadvisor.metagrad import forward as forward_module
from fastadvisor.metagrad.layerwise import POOLED, pool_gradient
from fastadvisor.models import layers_of
from tests.metagrad.problem import CLASSES, NETWORKS, SIZE, flat, plain, problem, relative

METHODS = ["mfrw", "mes", "mfrw-mes", "mw-net", "l2rw"]


def layerwise(task, budget=2, learned=False, **changes):
    layers = layers_of(task.model, (SIZE, SIZE))
    choice = LearnedLayers(GradientSamplers(len(layers)).double(), budget, **changes) if learned else None
    return LayerwiseEngine(ForwardEngine(plain), task.model, layers, budget, choice)


def active_names(engine, model):
    return set(model.part_parameters(engine.forward.cut, engine.forward.only))


def summed_over(task, names, moved):
    """Double backward with a second-order graph through ``names`` only; the weights of ``moved`` take the virtual step."""
    posed = task.posed(ReferenceEngine(plain))
    parameters = task.model.part_parameters()
    loss = task.method.loss(posed.shared.features, task.train, task.model.head, posed.advice)
    gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    virtual = {}
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        step = 0.1 * gradient if name in names else 0.1 * gradient.detach() if name in moved else 0.0
        virtual[name] = parameter.detach() - step
    with task.model.frozen_statistics():
        meta = cross_entropy(functional_call(task.model, virtual, (task.meta.images,)), task.meta.labels)
    return torch.autograd.grad(meta, task.method.meta_parameters(), allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chosen", [(0,), (1,), (3,), (0, 2), (1, 3), (0, 1, 2, 3)])
def test_layers_with_a_virtual_step_of_their_own(method, chosen, monkeypatch):
    task = problem(method)
    engine = layerwise(task, len(chosen))
    monkeypatch.setattr(torch, "randperm", lambda n: torch.tensor([*chosen, *(set(range(n)) - set(chosen))]))
    got = task.gradient(engine)
    names = active_names(engine, task.model)
    assert len(names) == 2 + sum(
        6 if index else 3 for index in chosen
    )  # the head's two; a block's two, a stem's one and its norm
    assert relative(got.gradients, summed_over(task, names, moved=())) <= 1e-12


@pytest.mark.parametrize("method", ["mfrw-mes", "mw-net"])
@pytest.mark.parametrize("chosen", [(1,), (0, 2), (3,)])
def test_layers_of_the_actual_steps_virtual_weights(method, chosen, monkeypatch):
    """One step behind, every weight takes the virtual step, and only the chosen layers count in the gradient."""
    task = problem(method)
    engine = layerwise(task, len(chosen))
    monkeypatch.setattr(torch, "randperm", lambda n: torch.tensor([*chosen, *(set(range(n)) - set(chosen))]))
    posed = task.posed(engine)
    virtual = ForwardEngine(plain).virtual_train(posed)
    got = engine.meta_gradient(replace(posed, uses_actual_step=True), virtual, task.meta)
    assert relative(got.gradients, summed_over(task, active_names(engine, task.model), moved=set(virtual))) <= 1e-12


def test_the_layers_gradients_add_up_to_the_exact_one():
    task = problem()
    exact = task.gradient(ForwardEngine(plain)).gradients
    layers = layers_of(task.model, (SIZE, SIZE))
    posed = task.posed(ForwardEngine(plain))
    virtual = ForwardEngine(plain).virtual_train(posed)
    parts = [ForwardEngine(plain, only=layer.modules).meta_gradient(posed, virtual, task.meta).gradients for layer in layers]
    head = ForwardEngine(plain, only=()).meta_gradient(posed, virtual, task.meta).gradients  # counted in each of them
    total = [sum(p) - (len(layers) - 1) * h for p, h in zip(zip(*parts, strict=True), head, strict=True)]
    assert relative(total, exact) <= 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_a_difference_is_a_tangent_to_first_order(method, monkeypatch):
    """In a smooth network; a rectifier adds the units whose kink lies within the step, which fall more slowly."""
    NETWORKS["smooth"] = lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)
    )
    try:
        task = problem(method, "smooth")
    finally:
        del NETWORKS["smooth"]
    exact = task.gradient(ForwardEngine(plain)).gradients
    errors = []
    for step in (1e-3, 1e-5):
        monkeypatch.setattr(forward_module, "DIFFERENCE_STEP", step)
        errors.append(relative(task.gradient(ForwardEngine(plain, tangent="difference")).gradients, exact))
    assert errors[0] < 0.05
    assert errors[1] == pytest.approx(errors[0] / 100, rel=0.1)


@pytest.mark.parametrize("network", [*NETWORKS, "cosine", "weight-norm", "spectral-norm", "tied", "tied-head-first"])
def test_differences_in_float32_keep_the_direction(network):
    exact, near = (
        flat(problem(network=network, dtype=torch.float32).gradient(ForwardEngine(plain, tangent=way)).gradients)
        for way in ("forward", "difference")
    )
    assert cosine_similarity(near, exact, dim=0) > 0.999
    assert float((near - exact).norm() / exact.norm()) < 0.03


def test_a_difference_along_nothing_is_nothing():
    task = problem()
    engine = ForwardEngine(plain, tangent="difference")
    posed = task.posed(engine)
    zeros = {name: torch.zeros_like(parameter) for name, parameter in task.model.part_parameters().items()}
    assert all(torch.equal(part, torch.zeros_like(part)) for part in engine.propagate_to_advisor(posed, zeros))


def test_the_length_of_a_difference_is_the_backbones_alone():
    """However long the direction is in the head, which the features do not depend on."""
    task = problem()
    engine = ForwardEngine(plain, tangent="difference")
    posed = task.posed(engine)
    _, gradient = engine.differentiate_meta_loss(task.model, engine.virtual_train(posed), task.meta)
    longer = gradient | {name: 1e6 * gradient[name] for name in task.model.head_parameters().values()}
    tangents = [engine._difference_tangent(task.model, posed.shared, direction) for direction in (gradient, longer)]
    assert torch.equal(*tangents)


def test_nothing_below_the_lowest_active_layer_is_touched(monkeypatch):
    task = problem()
    engine = layerwise(task, 1)
    monkeypatch.setattr(torch, "randperm", lambda n: torch.tensor([2, 0, 1, 3]))
    asked = []
    original = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda outputs, inputs, *a, **k: asked.append(len(inputs)) or original(outputs, inputs, *a, **k)
    )
    task.gradient(engine)
    assert engine.forward.cut.entry == "layer2"
    assert asked[:2] == [8, 8]  # virtual and meta backward: six weights of the block, two of the head
    assert "layer1" in engine.forward.cut.below


def test_random_layers_are_as_many_as_asked_and_change():
    task = problem()
    engine = layerwise(task, 2)
    torch.manual_seed(0)
    seen = set()
    for _ in range(40):
        engine.plan()
        assert sum(engine.active) == 2
        seen.add(tuple(engine.active))
    assert len(seen) == 6


def test_no_layer_at_all_is_the_top_one():
    task = problem()
    engine = layerwise(task, learned=True)
    engine.learned.samplers.forward = lambda pooled: torch.zeros(len(pooled), requires_grad=True)
    engine.plan()
    assert engine.active == [False, False, False, True]


@pytest.mark.parametrize("budget", [2, 5])
def test_the_budget_is_kept_over_all_samplers(budget):
    torch.manual_seed(0)
    learned = LearnedLayers(GradientSamplers(8), budget)
    features = torch.randn(8, POOLED)
    counts = []
    for _ in range(400):
        counts.append(sum(learned.choose(features)))
        learned.differentiate(torch.zeros(8))
        learned.learn(plain)
    assert sum(counts[200:]) / 200 == pytest.approx(budget, abs=0.6)


def test_a_layer_that_lowers_the_meta_loss_is_chosen_more_often():
    torch.manual_seed(0)
    learned = LearnedLayers(GradientSamplers(6), budget=2)
    features = torch.randn(6, POOLED)
    chosen = torch.zeros(6)
    for index in range(600):
        active = torch.tensor(learned.choose(features))
        effects = torch.zeros(6)
        effects[3] = -1.0
        learned.differentiate(effects * active)
        learned.learn(plain)
        chosen += active * (index >= 300)
    assert chosen[3] > 250
    assert chosen[[0, 1, 2, 4, 5]].sum() < 450


@pytest.mark.parametrize("matching_weight", [0.0, 0.3])
def test_the_effect_of_a_layer_is_the_derivative_of_what_the_samplers_minimise(matching_weight):
    """Finite differences in r_l of Lmeta(w'(r)) + λ2 ‖pool − pool‖², w' = w − α r ∇L, at the decisions taken."""
    task = problem()
    engine = layerwise(task, learned=True, matching_weight=matching_weight)
    for parameter in task.model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=parameter.dtype)
    engine.learned.samplers.forward = lambda pooled: torch.ones(len(pooled), requires_grad=True)
    seen = []
    engine.learned.differentiate = seen.append
    posed = task.posed(engine)
    virtual = engine.virtual_train(posed)
    engine.meta_gradient(posed, virtual, task.meta)
    weights = {name: p.detach() for name, p in task.model.named_parameters()}
    head = task.model.head_parameters()["weight"]

    def objective(index, r):
        prefixes = tuple(f"model.{name}." for name in engine.layers[index].modules)
        moved = {n: weights[n] + (r if n.startswith(prefixes) else 1.0) * (virtual[n] - weights[n]) for n in weights}
        moved[head] = moved[head].requires_grad_()
        with task.model.frozen_statistics():
            loss = cross_entropy(functional_call(task.model, moved, (task.meta.images,)), task.meta.labels)
        (of_meta,) = torch.autograd.grad(loss, moved[head])
        mismatch = (pool_gradient(task.model.head.weight.grad) - pool_gradient(of_meta)).square().sum()
        return float(loss.detach() + matching_weight * mismatch.detach())

    for index in range(len(engine.layers)):
        difference = (objective(index, 1 + 1e-4) - objective(index, 1 - 1e-4)) / 2e-4
        assert float(seen[0][index]) == pytest.approx(difference, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("frozen", [(), ("parametrizations.weight.original1",), ("bias", "weight")], ids=str)
def test_learned_layers_with_any_head(frozen):
    """Gradients are matched by the head's largest trainable parameter; a frozen head has none to match."""
    task = problem(network="batchnorm")
    if "weight" not in frozen:
        torch.nn.utils.parametrizations.weight_norm(task.model.head)
    for name in frozen:
        task.model.head.get_parameter(name).requires_grad_(False)
    engine = layerwise(task, learned=True, matching_weight=0.3)
    for _ in range(2):
        task.model(task.train.images).square().sum().backward()
        got = task.gradient(engine)
        assert relative(got.gradients, summed_over(task, active_names(engine, task.model), moved=())) <= 1e-12
    rows, of_head = engine._training_gradients()
    assert rows.abs().sum() > 0
    assert of_head.numel() == (1 if "weight" in frozen else 5 if frozen else 5 * task.model.head.in_features)
    engine.load_state_dict(engine.state_dict())


def test_the_samplers_see_gradients_in_common_units():
    task = problem()
    engine = layerwise(task, learned=True)
    rows, of_head = engine._training_gradients()
    assert torch.equal(rows, torch.zeros_like(rows))
    assert torch.equal(of_head, torch.zeros_like(of_head))
    task.model(task.train.images).square().sum().backward()
    rows, _ = engine._training_gradients()
    assert rows.shape == (4, POOLED)
    assert float(rows.square().mean()) == pytest.approx(1)
    scaled = [p.grad.mul_(1e-6) for p in task.model.parameters()]
    assert scaled
    torch.testing.assert_close(engine._training_gradients()[0], rows)
    lengths = rows.norm(dim=1)
    for name in engine.layers[1].modules:
        for p in task.model.model.get_submodule(name).parameters():
            p.grad.mul_(7)
    changed = engine._training_gradients()[0].norm(dim=1) / lengths
    torch.testing.assert_close(changed / changed[0], torch.tensor([1, 7, 1, 1]).double())


def test_samplers_step_once_by_what_a_meta_step_has_left():
    learned = LearnedLayers(GradientSamplers(4), 2)
    learned.choose(torch.randn(4, POOLED))
    learned.differentiate(torch.ones(4))
    before = flat(learned.samplers.parameters()).detach().clone()
    learned.learn(plain)
    after = flat(learned.samplers.parameters()).detach().clone()
    assert not torch.equal(after, before)
    learned.learn(plain)  # an iteration without a meta step: the gradients are the last one's
    assert torch.equal(flat(learned.samplers.parameters()), after)


def test_a_state_does_not_move_with_the_run():
    task = problem()
    engine = layerwise(task, learned=True)
    task.model(task.train.images).square().sum().backward()
    state = engine.state_dict()
    kept = {name: state[name].clone() for name in ("pooled_gradients", "head_gradient")}
    for p in task.model.parameters():
        p.grad.add_(1)
    for name, value in kept.items():
        assert torch.equal(state[name], value)
