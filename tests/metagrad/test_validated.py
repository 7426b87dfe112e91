from types import SimpleNamespace

import pytest
import torch

from fastadvisor.metagrad import ForwardEngine, MetaGradient, ValidatedEngine
from fastadvisor.metagrad.validated import Check
from fastadvisor.models import cut_at
from tests.metagrad.problem import SIZE, flat, plain, problem, relative


class Sabotaged(ForwardEngine):
    """The exact engine, with its gradients turned by ``turn``."""

    turn = staticmethod(lambda gradient: gradient)

    def meta_gradient(self, *args):
        result = super().meta_gradient(*args)
        return MetaGradient(result.loss, tuple(self.turn(gradient) for gradient in result.gradients))


def validated(every=1, floor=0.5, **changes):
    said = []
    engine = ValidatedEngine(Sabotaged(plain), ForwardEngine(plain), every, floor, said.append, **changes)
    return engine, said


def test_a_faithful_approximation_has_a_cosine_of_one_and_stays_in_charge():
    engine, said = validated()
    task = problem()
    task.gradient(engine)
    assert engine.checks[0].cosine == pytest.approx(1)
    assert engine.checks[0].norm_ratio == pytest.approx(1)
    assert not engine.falling_back
    assert not said


def test_a_sabotaged_approximation_is_replaced_at_once_and_said_once():
    engine, said = validated()
    task = problem()
    expected = task.gradient(ForwardEngine(plain)).gradients
    engine.approximate.turn = torch.neg
    for _ in range(3):
        assert relative(task.gradient(engine).gradients, expected) <= 1e-12
        assert engine.falling_back
    assert [check.cosine for check in engine.checks] == pytest.approx([-1, -1, -1])
    assert len(said) == 1
    assert "--min-meta-cosine 0.5" in said[0]


def test_the_approximation_takes_over_again_when_it_is_good_again():
    engine, said = validated()
    task = problem()
    engine.approximate.turn = torch.neg
    task.gradient(engine)
    engine.approximate.turn = lambda gradient: 2 * gradient  # the direction is right, the length is not
    got = task.gradient(engine).gradients
    assert not engine.falling_back
    assert relative(got, [2 * g for g in task.gradient(ForwardEngine(plain)).gradients]) <= 1e-12
    assert engine.checks[-1].norm_ratio == pytest.approx(2)
    assert len(said) == 1


def test_between_checks_the_verdict_stands_and_nothing_exact_is_computed(monkeypatch):
    engine, _ = validated(every=3)
    task = problem()
    engine.approximate.turn = torch.neg
    calls = []
    original = ForwardEngine.meta_gradient
    monkeypatch.setattr(ForwardEngine, "meta_gradient", lambda self, *args: calls.append(type(self)) or original(self, *args))
    for _ in range(4):
        task.gradient(engine)
    both, alone = [Sabotaged, ForwardEngine], [ForwardEngine]
    assert calls == [*both, *alone, *alone, ForwardEngine, Sabotaged]


def test_nan_falls_back():
    engine, _ = validated()
    engine.approximate.turn = lambda gradient: gradient * float("nan")
    assert all(gradient.isfinite().all() for gradient in problem().gradient(engine).gradients)
    assert engine.falling_back


def test_a_gradient_of_zero_has_no_direction_and_two_of_them_agree():
    engine, _ = validated()
    zero = MetaGradient(torch.tensor(0.0), (torch.zeros(3),))
    one = MetaGradient(torch.tensor(0.0), (torch.ones(3),))
    engine._compare(zero, zero)
    engine._compare(zero, one)
    engine._compare(one, zero)
    assert [check.cosine for check in engine.checks] == [1, 0, 0]


def test_ranks_decide_by_their_common_numbers():
    """This rank's gradients are opposite; on the mean of all ranks they have a cosine of 0.9."""
    common = SimpleNamespace(average=lambda tensors: [torch.tensor([2.0, 4.0, 7.2]) for _ in tensors])
    engine, said = validated(ranks=common)
    one, opposite = (MetaGradient(torch.tensor(0.0), (value * torch.ones(3),)) for value in (1, -1))
    engine._compare(opposite, one)
    assert engine.checks[0] == pytest.approx((0.9, 0.5))
    assert not engine.falling_back
    assert not said


@pytest.mark.parametrize("network", ["batchnorm", "dropout"])
def test_a_check_changes_nothing_else(network):
    """With a floor that is never reached, gradient, statistics and random stream are those of the approximation alone."""
    task = problem(network=network)
    cut = cut_at(task.model, (SIZE, SIZE), 1)
    assert cut is not None
    alone = task.gradient(ForwardEngine(plain, cut))
    after, buffers = torch.get_rng_state(), [buffer.clone() for buffer in task.model.buffers()]
    watched = ValidatedEngine(ForwardEngine(plain, cut), ForwardEngine(plain), 1, -1.0)
    task = problem(network=network)
    got = task.gradient(watched)
    assert torch.equal(flat(got.gradients), flat(alone.gradients))
    assert torch.equal(torch.get_rng_state(), after)
    for buffer, expected in zip(task.model.buffers(), buffers, strict=True):
        assert torch.equal(buffer, expected)
    exact = task.gradient(ForwardEngine(plain))
    cosine = torch.cosine_similarity(flat(alone.gradients), flat(exact.gradients), dim=0)
    assert watched.checks[0].cosine == pytest.approx(float(cosine), rel=1e-9)


def test_collect_empties_and_state_survives():
    engine, _ = validated()
    engine.approximate.turn = torch.neg
    problem().gradient(engine)
    assert engine.collect()["meta_cosine"] == pytest.approx(-1)
    assert engine.collect() == {}
    engine.checks = [Check(0.2, 1.0), Check(0.8, 3.0), Check(0.5, 2.0)]
    assert engine.collect() == pytest.approx({"meta_cosine": 0.5, "meta_cosine_min": 0.2, "meta_norm_ratio": 2.0})
    other, said = validated()
    other.load_state_dict(engine.state_dict())
    assert (other.meta_steps, other.falling_back, other.warned) == (1, True, True)
    other.approximate.turn = torch.neg
    problem().gradient(other)
    assert said == []


@pytest.mark.parametrize("method", ["mfrw-mes", "mw-net", "l2rw"])
@pytest.mark.parametrize("attached", [False, True])
def test_a_check_of_a_lean_step(method, attached):
    """The first engine lets the graph go, and the second needs it again, with the advice that hangs on it."""
    task = problem(method)
    cut = cut_at(task.model, (SIZE, SIZE), 1)
    expected = task.gradient(ForwardEngine(plain, cut), attached=attached).gradients
    task = problem(method)
    watched = ValidatedEngine(ForwardEngine(plain, cut), ForwardEngine(plain), 1, -1.0)
    posed = task.posed(watched, lean=True, attached=attached)
    virtual = watched.virtual_train(posed)
    assert posed.shared.released
    got = watched.meta_gradient(posed, virtual, task.meta).gradients
    assert relative(got, expected) <= 1e-12
    exact = problem(method).gradient(ForwardEngine(plain), attached=attached).gradients
    cosine = torch.cosine_similarity(flat(expected), flat(exact), dim=0)
    assert watched.checks[0].cosine == pytest.approx(float(cosine), rel=1e-9)


def test_an_empty_state_is_of_a_run_that_needed_no_watching():
    engine, _ = validated()
    engine.load_state_dict({})
    assert engine.meta_steps == 0
