"""Mixed precision: what stays in float32, what is scaled, and what an overflow leaves undone."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from fastadvisor.errors import UserError
from fastadvisor.iterations import build_iteration
from fastadvisor.metagrad import ForwardEngine, GradientSamplers, LayerwiseEngine, LearnedLayers
from fastadvisor.models import layers_of
from fastadvisor.runtime import precision
from fastadvisor.runtime.execution import Execution
from fastadvisor.runtime.precision import amp_dtype
from tests.metagrad.problem import NETWORKS, SIZE, flat, plain, problem
from tests.test_watch import trainer

HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, None])
def test_autocast(dtype):
    x = torch.ones(2, 2)
    execution = Execution(dtype=dtype)
    with execution():
        assert (x @ x).dtype is (dtype or torch.float32)
    assert (execution.scaler is not None) == (dtype is torch.float16)


def test_bfloat16_where_the_device_has_it(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert amp_dtype("auto", cpu) is amp_dtype("bfloat16", cpu) is torch.bfloat16
    assert amp_dtype("float16", cpu) is torch.float16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    assert amp_dtype("auto", cuda) is torch.float16
    with pytest.raises(UserError, match="Tesla V100 has no bfloat16; use --amp-dtype float16"):
        amp_dtype("bfloat16", cuda)


def test_tf32():
    before = torch.get_float32_matmul_precision()
    try:
        precision.use_tf32(True)
        assert torch.get_float32_matmul_precision() == "high"
        precision.use_tf32(False)
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("method", ["mfrw-mes", "mw-net", "l2rw"])
@pytest.mark.parametrize("network", NETWORKS)
def test_float16_keeps_the_direction(method, network):
    task = problem(method, network, dtype=torch.float32)
    exact = task.gradient(ForwardEngine(plain))
    mixed = task.gradient(ForwardEngine(Execution(dtype=torch.float16)))
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in mixed.gradients)
    assert cosine_similarity(flat(mixed.gradients), flat(exact.gradients), dim=0) >= 0.99
    assert float(flat(mixed.gradients).norm() / flat(exact.gradients).norm()) == pytest.approx(1, abs=0.1)


def test_small_gradients_do_not_vanish_in_float16():
    x, weight = torch.randn(64, 8), torch.randn(8, 4, requires_grad=True)

    def loss(execution):
        with execution():
            return 1e-7 * (x @ weight).float().mean()

    wanted = plain.gradients([0], lambda _: loss(plain), [weight])[0]
    execution = Execution(dtype=torch.float16)
    torch.testing.assert_close(execution.gradients([0], lambda _: loss(execution), [weight])[0], wanted, rtol=1e-2, atol=0)
    execution.scaler = None
    assert not execution.gradients([0], lambda _: loss(execution), [weight])[0].any()


def test_small_directions_do_not_vanish_in_float16():
    """The tangent pass is linear in its direction: one of 1e-9 must give 1e-9 times the tangent, not nothing."""
    task = problem("mfrw", dtype=torch.float32)
    engine = ForwardEngine(Execution(dtype=torch.float16))
    posed = task.posed(engine)
    _, gradient = engine.differentiate_meta_loss(task.model, engine.virtual_train(posed), task.meta)
    tangents = [
        engine._forward_tangent(task.model, posed.shared, {name: scale * g for name, g in gradient.items()})
        for scale in (1.0, 1e-9)
    ]
    assert tangents[0].abs().max() > 0
    torch.testing.assert_close(tangents[1] * 1e9, tangents[0].float(), rtol=1e-2, atol=1e-3 * float(tangents[0].abs().max()))


@pytest.mark.parametrize("dtype", HALF)
def test_what_stays_in_float32(dtype, monkeypatch):
    run = trainer(method="mfrw-mes", amp=True, amp_dtype=str(dtype).removeprefix("torch."))
    seen = []
    advise = run.method.advise
    monkeypatch.setattr(run.method, "advise", lambda *args: seen.append(advise(*args)) or seen[-1])
    result = run.step(*run.batches(run.stages[0]))
    assert result.loss.dtype == result.meta_loss.dtype == torch.float32
    assert all(part.dtype == torch.float32 for advice in seen for part in advice.outputs.values())
    state = [*run.model.state_dict().values(), *run.method.advisor.state_dict().values()]
    state += [v for s in (run.step.optimizer, run.step.advisor_optimizer) for p in s.state.values() for v in p.values()]
    assert {value.dtype for value in state if value.is_floating_point()} == {torch.float32}


def learned_step(execution):
    task = problem("mfrw", dtype=torch.float32)
    layers = layers_of(task.model, (SIZE, SIZE))
    torch.manual_seed(0)
    learned = LearnedLayers(GradientSamplers(len(layers)), 2)
    engine = LayerwiseEngine(ForwardEngine(execution), task.model, layers, 2, learned)
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
    advisor = torch.optim.Adam(task.method.advisor.parameters())
    step = build_iteration(task.model, task.method, optimizer, advisor, engine, execution)
    return task, step, [task.model, task.method.advisor, learned.samplers]


def test_an_overflow_leaves_all_three_optimizers_where_they_were_and_lowers_the_scale():
    execution = Execution(dtype=torch.float16)
    task, step, modules = learned_step(execution)
    execution.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = [parameter.detach().clone() for module in modules for parameter in module.parameters()]
    step(task.train, task.meta)
    after = [parameter for module in modules for parameter in module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert execution.scaler.get_scale() == 2.0**59
    execution.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    step(task.train, task.meta)
    for module in modules:
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_the_scale_survives_a_checkpoint():
    first, second = Execution(dtype=torch.float16), Execution(dtype=torch.float16)
    task, step, _ = learned_step(first)
    first.scaler = torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=2)
    step(task.train, task.meta)
    second.load_state_dict(first.state_dict())
    assert second.scaler.get_scale() == 512.0
    assert second.scaler.state_dict() == first.scaler.state_dict()
    step(task.train, task.meta)
    assert first.scaler.get_scale() == 1024.0
    assert Execution().state_dict()["scaler"] == {}


def test_a_step_with_and_without_a_loss_scale_is_the_same_in_float32():
    ends = []
    for scale in (None, 2.0**10):
        execution = Execution()
        execution.scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        task = problem("mfrw", dtype=torch.float32)
        optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1, momentum=0.9)
        advisor = torch.optim.Adam(task.method.advisor.parameters(), lr=1e-2)
        step = build_iteration(task.model, task.method, optimizer, advisor, ForwardEngine(execution), execution, clip=1.0)
        for _ in range(3):
            step(task.train, task.meta)
        ends.append(torch.cat([p.detach().flatten() for m in (task.model, task.method.advisor) for p in m.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("accumulate", [2, 5])
@pytest.mark.parametrize("behind", [False, True])
def test_micro_batches_add_up_to_the_batch(accumulate, behind):
    """No normalisation over the batch: the same numbers but for rounding, in float64."""
    ends = []
    for parts in (1, accumulate):
        task = problem("mfrw-mes", "groupnorm", beta_draw="expected")
        task.train = type(task.train)(*(part[:10] for part in task.train))
        optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1, momentum=0.9)
        advisor = torch.optim.SGD(task.method.advisor.parameters(), lr=1.0)
        step = build_iteration(
            task.model, task.method, optimizer, advisor, ForwardEngine(plain), plain, behind=behind, accumulate=parts
        )
        losses = [step(task.train, task.meta) for _ in range(3)]
        left = [p.detach().flatten() for m in (task.model, task.method.advisor) for p in m.parameters()]
        ends.append(torch.cat([*left, torch.stack([torch.stack([r.loss, r.meta_loss]) for r in losses]).flatten()]))
    assert float((ends[0] - ends[1]).norm() / ends[0].norm()) <= 1e-12
