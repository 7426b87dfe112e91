"""The virtual step where the layers have rates of their own: the optimizer's step, and the gradient that follows from it."""

import pytest
import torch

from fastadvisor.metagrad import ForwardEngine, ReferenceEngine, VirtualStep
from fastadvisor.training.parameter_groups import parameter_groups
from tests.metagrad.problem import flat, plain, problem, relative


def optimizer_of(task, rates="rising"):
    """SGD with momentum and weight decay whose buffers are filled, and rates that rise to the head, fall, or begin with 0."""
    groups = parameter_groups(task.model, 0.5, 0.1)
    assert len(groups) > 2
    if rates == "falling":
        groups = groups[::-1]
    elif rates == "first at rest":
        groups[0]["lr"] = groups[0]["lr_scale"] = 0.0
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=5e-2)
    task.model(task.train.images).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("with_optimizer", [False, True], ids=["plain", "with the optimizer"])
@pytest.mark.parametrize("rates", ["rising", "falling", "first at rest"])
def test_forward_equals_double_backward_at_layer_wise_rates(rates, with_optimizer):
    task = problem()
    step = VirtualStep.of(optimizer_of(task, rates), task.model, with_optimizer=with_optimizer)
    expected, got = task.gradient(ReferenceEngine(plain), step), task.gradient(ForwardEngine(plain), step)
    assert flat(expected.gradients).norm() > 1e-6
    assert relative(got.gradients, expected.gradients) <= 1e-10


@pytest.mark.parametrize("with_optimizer", [False, True], ids=["plain", "with the optimizer"])
@pytest.mark.parametrize("rates", ["rising", "falling", "first at rest"])
def test_the_virtual_step_at_layer_wise_rates_is_the_optimizers_own_step(rates, with_optimizer):
    task = problem()
    engine, optimizer = ForwardEngine(plain), optimizer_of(task, rates)
    if not with_optimizer:
        for group in optimizer.param_groups:
            group["momentum"] = group["weight_decay"] = 0
    posed = task.posed(engine, VirtualStep.of(optimizer, task.model, with_optimizer=with_optimizer))
    virtual = engine.virtual_train(posed)
    optimizer.zero_grad()
    task.method.loss(posed.shared.features, task.train, task.model.head, posed.advice.detach()).backward()
    optimizer.step()
    for name, parameter in task.model.named_parameters():
        torch.testing.assert_close(virtual[name], parameter.detach(), rtol=1e-12, atol=1e-14)
