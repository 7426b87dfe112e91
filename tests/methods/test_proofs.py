"""Methods that need what the frame offers: nothing (focal), class counts (balanced-softmax), sample ids and state (elr), and
stages (crt).
"""

import pytest
import torch
from torch.nn.functional import cross_entropy

import fastadvisor
from fastadvisor import losses
from fastadvisor.config import Config, resolve, select_settings
from fastadvisor.datasets import load_source, prepare
from fastadvisor.loading.batch import Batch
from fastadvisor.methods import METHODS, DataFacts
from fastadvisor.runtime import checkpoint
from fastadvisor.training.trainer import Trainer
from tests.faults.kills import left_by, same
from tests.test_resume import stopped_after

QUIET = {"progress": False, "tensorboard": False, "device": "cpu", "model": "resnet8", "imbalance_factor": 20}
FACTS = DataFacts(3, 20, torch.tensor([15, 4, 1]))
Z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
BATCH = Batch(torch.zeros(5, 3, 4, 4), torch.tensor([0, 1, 2, 0, 0]), torch.tensor([3, 19, 7, 0, 11]))


def method(name, **settings):
    kind = METHODS[name]
    return kind(kind.Settings(**settings), 8, FACTS)


def trainer(**changes):
    config = resolve(Config, **{**QUIET, "epochs": 2, **changes})
    return Trainer(config, prepare(load_source(config), config, config.seed), torch.device("cpu"))


def test_settings_come_from_the_configuration_by_name_and_are_the_defaults_elsewhere():
    config = resolve(Config, advisor_width=7, advisor_lr=0.5)
    settings = select_settings(METHODS["mfrw-mes"].Settings, config)
    assert (settings.advisor_width, settings.beta_draw, settings.advisor_lr) == (7, "class", 0.5)
    assert select_settings(METHODS["focal"].Settings, object()).focal_gamma == 1.0


def test_focal():
    torch.testing.assert_close(method("focal", focal_gamma=2.0).sample_losses(Z, BATCH), losses.focal(Z, BATCH.labels, 2.0))
    assert not method("focal").learns


def test_balanced_softmax_goes_by_the_labels_as_given():
    expected = cross_entropy(Z + FACTS.label_counts.log(), BATCH.labels, reduction="none")
    torch.testing.assert_close(method("balanced-softmax").sample_losses(Z, BATCH), expected)
    run = trainer(method="balanced-softmax", noise="flip", noise_rate=0.4)
    given = torch.bincount(run.data.labels[run.data.train_ids], minlength=10)
    assert torch.equal(run.method.counts, given)
    assert not torch.equal(given, run.data.true_class_counts())


def test_elr_remembers_predictions_by_sample():
    elr = method("elr", elr_momentum=0.9, elr_weight=2.0)
    elr.observe(Z, BATCH)
    torch.testing.assert_close(elr.targets[BATCH.ids], 0.1 * torch.softmax(Z, 1), rtol=1e-3, atol=1e-4)
    seen = elr.targets.any(1)
    assert seen.sum() == 5
    assert seen[BATCH.ids].all()
    torch.testing.assert_close(elr.sample_losses(Z, BATCH), losses.early_learning(Z, BATCH.labels, elr.targets[BATCH.ids], 2.0))


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}, {"lean": True}])
def test_every_sample_is_observed_once_an_iteration(changes):
    run, seen = trainer(method="elr", batch_size=64, **changes), []
    observe = type(run.method).observe

    class Spy(type(run.method)):
        def observe(self, z_BC, batch):
            seen.append(batch.ids)
            observe(self, z_BC, batch)

    run.method.__class__ = Spy
    train, meta = run.batches(run.stages[0])
    run.step(train, meta)
    assert torch.equal(torch.cat(seen), train.ids)


def test_a_skipped_step_is_not_remembered():
    run = trainer(method="elr", nan_policy="skip")
    train, meta = run.batches(run.stages[0])
    run.step(train, meta)
    before = run.method.targets.clone()
    train, meta = run.batches(run.stages[0])
    result = run.step(train._replace(images=train.images * float("inf")), meta)
    assert result.skipped
    assert torch.equal(run.method.targets, before)


@pytest.mark.parametrize("loader", ["resident", "torch"])
@pytest.mark.parametrize("name", ["elr", "crt"])
@pytest.mark.parametrize("iteration", [7, 10, 12], ids=["first stage", "between stages", "second stage"])
def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path, monkeypatch, name, loader, iteration):
    """Five iterations an epoch; the second stage is the last of three epochs."""
    settings = {**QUIET, "method": name, "epochs": 3, "batch_size": 64, "loader": loader, "workers": 0, "ema_decay": 0.9}
    fastadvisor.train(output=str(tmp_path / "whole"), **settings)
    output = tmp_path / "part"
    stopped_after(monkeypatch, iteration, output, **settings)
    assert checkpoint.load(tmp_path / "part" / "last.pt")["iteration"] == iteration
    fastadvisor.train(output=str(tmp_path / "part"), resume=True, **settings)
    (whole, lines), (part, again) = left_by(tmp_path / "whole"), left_by(tmp_path / "part")
    assert same(whole["method"], part["method"])
    assert [key for key in whole if not same(whole[key], part[key])] == []
    assert lines == again


def test_the_second_stage_of_crt_trains_a_new_head_alone(tmp_path):
    run = trainer(method="crt", epochs=4, batch_size=64)
    first, second = run.stages
    assert (first.start, first.end, second.start, second.end) == (0, 3, 3, 4)
    run._enter(first)
    for _ in range(len(run.train_loader)):
        run.step(*run.batches(first))
    body = {name: value.clone() for name, value in run.model.model.state_dict().items() if not name.startswith("fc")}
    head = run.model.head.weight.detach().clone()
    run.epoch = 3
    run._enter(second)
    run.model.train()
    assert not torch.equal(head, run.model.head.weight)
    assert not any(run.step.optimizer.state.get(p) for p in run.model.head.parameters())
    fresh = run.model.head.weight.detach().clone()
    labels = []
    for _ in range(len(run.train_loader)):
        batches = run.batches(second)
        labels.append(batches[0].labels)
        run.step(*batches)
    counts = torch.bincount(torch.cat(labels), minlength=10)
    assert counts.max() - counts.min() <= 7
    assert not torch.equal(fresh, run.model.head.weight)
    for name, value in body.items():  # running statistics, too
        assert torch.equal(value, run.model.model.state_dict()[name]), name


def test_what_a_method_does_to_the_logits_at_test_time(monkeypatch):
    run = trainer(method="ce", epochs=1)
    plain = run.test(run.loaders.test)

    class Seventh(METHODS["ce"]):
        def adjust(self, z_BC):
            return z_BC + 1e6 * torch.nn.functional.one_hot(torch.tensor(7), z_BC.shape[1])

    run.method.__class__ = Seventh
    adjusted = run.test(run.loaders.test)
    share = 100 * (run.data.test.labels == 7).double().mean()
    assert adjusted.top1 == pytest.approx(float(share))
    assert adjusted.top1 != plain.top1


def test_a_method_is_told_of_every_epoch(tmp_path, monkeypatch):
    clocks = []
    monkeypatch.setattr(METHODS["finetune"], "begin_epoch", lambda self, clock: clocks.append(tuple(clock)))
    fastadvisor.train(output=str(tmp_path / "run"), **{**QUIET, "method": "finetune", "epochs": 5})
    assert clocks == [(0, 5, 0, 0, 4), (1, 5, 0, 1, 4), (2, 5, 0, 2, 4), (3, 5, 0, 3, 4), (4, 5, 1, 0, 1)]


@pytest.mark.parametrize("name", ["focal", "balanced-softmax", "elr", "crt"])
def test_a_run_of_each(tmp_path, name):
    result = fastadvisor.train(output=str(tmp_path / "run"), **{**QUIET, "method": name, "epochs": 2})
    assert result.summary["method"] == name
    assert result.summary["meta_gradient"] is None
