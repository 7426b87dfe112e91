import math
from itertools import pairwise

import pytest

from fastadvisor.config import OptimizerConfig
from fastadvisor.methods import Stage
from fastadvisor.methods.finetune import Finetune
from fastadvisor.training.schedule import divide, learning_rate


def changes(config, total):
    """The steps at which the rate differs from the step before."""
    rates = [learning_rate(config, step, total) for step in range(total)]
    return [step for step in range(1, total) if rates[step] != rates[step - 1]]


def test_milestones_land_on_the_first_step_of_their_epoch():
    config = OptimizerConfig(lr=0.1, milestones=(0.8, 0.9), lr_decay=0.1)
    total = 200 * 391
    assert changes(config, total) == [160 * 391, 180 * 391]
    rates = [learning_rate(config, step, total) for step in (0, 160 * 391 - 1, 160 * 391, 180 * 391 - 1, 180 * 391, total - 1)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rel=1e-12)


@pytest.mark.parametrize(("milestone", "epochs", "epoch"), [(0.07, 100, 7), (0.29, 100, 29), (0.55, 20, 11), (0.14, 50, 7)])
@pytest.mark.parametrize("steps", [1, 98, 391])
def test_fractions_that_floats_miss(milestone, epochs, epoch, steps):
    # 0.07 * 100 = 7.000000000000001, 0.29 * 100 = 28.999999999999996.
    assert changes(OptimizerConfig(milestones=(milestone,)), epochs * steps) == [epoch * steps]


@pytest.mark.parametrize("milestones", [(), (0.9, 0.5), (0.5, 0.9)])
def test_order_of_milestones_does_not_matter(milestones):
    assert changes(OptimizerConfig(milestones=milestones), 10) == [round(10 * m) for m in sorted(milestones)]


def test_step_decay():
    config = OptimizerConfig(lr=0.4, milestones=(0.25, 0.5, 0.75), lr_decay=0.5)
    assert [learning_rate(config, step, 4) for step in range(4)] == pytest.approx([0.4, 0.2, 0.1, 0.05])


def test_cosine():
    config = OptimizerConfig(lr=0.1, schedule="cosine")
    rates = [learning_rate(config, step, 1000) for step in range(1001)]
    assert rates[0] == 0.1
    assert rates[500] == pytest.approx(0.05)
    assert rates[250] == pytest.approx(0.05 * (1 + math.sqrt(0.5)))
    assert 0 < rates[999] < 1e-6
    assert rates[1000] == 0
    assert all(later < earlier for earlier, later in pairwise(rates))


def test_cosine_ignores_milestones():
    one = OptimizerConfig(schedule="cosine", milestones=(0.1,), lr_decay=0.5)
    other = OptimizerConfig(schedule="cosine", milestones=())
    assert [learning_rate(one, s, 10) for s in range(10)] == [learning_rate(other, s, 10) for s in range(10)]


def test_constant():
    config = OptimizerConfig(lr=0.03, schedule="constant")
    assert {learning_rate(config, step, 50) for step in range(50)} == {0.03}


@pytest.mark.parametrize("schedule", ["step", "cosine", "constant"])
def test_a_run_of_one_step(schedule):
    assert learning_rate(OptimizerConfig(lr=0.2, schedule=schedule), 0, 1) == 0.2


def bounds(stages, epochs):
    return [(part.start, part.end) for part in divide(stages, epochs)]


@pytest.mark.parametrize("epochs", [1, 2, 200])
def test_one_stage_is_the_whole_run(epochs):
    stage = Stage()
    (only,) = divide([stage], epochs)
    assert (only.stage, only.start, only.end) == (stage, 0, epochs)


@pytest.mark.parametrize(
    ("shares", "epochs", "want"),
    [
        ((0.9, 0.1), 200, [(0, 180), (180, 200)]),
        ((0.9, 0.1), 15, [(0, 14), (14, 15)]),
        ((0.9, 0.1), 3, [(0, 2), (2, 3)]),
        ((0.01, 0.99), 3, [(0, 1), (1, 3)]),
        ((1.0, 0.0), 3, [(0, 3), (3, 3)]),
        ((0.7, 0.3), 10, [(0, 7), (7, 10)]),
        ((0.9, 0.1), 1, [(0, 1), (1, 1)]),
        ((0.2, 0.8), 1, [(0, 0), (0, 1)]),
        ((1 / 3, 1 / 3, 1 / 3), 10, [(0, 3), (3, 7), (7, 10)]),
    ],
)
def test_shares_round_to_whole_epochs(shares, epochs, want):
    assert bounds([Stage(fraction=share) for share in shares], epochs) == want


@pytest.mark.parametrize("epochs", range(1, 40))
@pytest.mark.parametrize("shares", [(0.1,) * 10, (0.15, 0.35, 0.5), (0.99, 0.01)])
def test_every_epoch_belongs_to_one_stage(shares, epochs):
    parts = bounds([Stage(fraction=share) for share in shares], epochs)
    assert [epoch for start, end in parts for epoch in range(start, end)] == list(range(epochs))


def test_finetune_divides_as_its_fraction_says():
    method = Finetune(Finetune.Settings(finetune_fraction=0.2, finetune_lr_factor=0.5), 8, None)
    train, meta = divide(method.stages(), 50)
    assert (train.stage.source, train.start, train.end, train.stage.lr_factor) == ("train", 0, 40, 1.0)
    assert (meta.stage.source, meta.start, meta.end, meta.stage.lr_factor) == ("meta", 40, 50, 0.5)
