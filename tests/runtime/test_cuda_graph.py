"""Iterations recorded and replayed: by a stand-in here, by CUDA graphs in tests/test_gpu.py."""

import pytest
import torch

from fastadvisor.commands.train import train_config
from fastadvisor.config import Config, resolve
from fastadvisor.datasets import load_source, prepare
from fastadvisor.errors import UserError
from fastadvisor.methods import METHODS
from fastadvisor.runtime import checkpoint, cuda_graph
from fastadvisor.training.trainer import Trainer
from tests.replays import check_bad_numbers_reach_no_weight

QUIET = {"progress": False, "tensorboard": False, "device": "cpu", "cuda_graph": "on", "batch_size": 32, "meta_batch_size": 32}


def make(**settings):
    config = resolve(Config, **{**QUIET, **settings})
    run = Trainer(config, prepare(load_source(config), config, 0), torch.device("cpu"))
    run.model.train()
    return run


def taken(run, steps):
    """Losses of each iteration, and what is left at the end."""
    losses = []
    for index in range(steps):
        run.set_lr(run.stages[0], index)
        result = run.iterate(*run.batches(run.stages[0]))
        losses.append([None if part is None else float(part) for part in (result.loss, result.meta_loss)])
    advice = [] if run.step.advice is None else list(run.step.advice.outputs.values())
    engine = {} if run.step.engine is None else run.step.engine.state_dict()
    states = [engine, *(optimizer.state_dict() for optimizer in run.step.optimizers())]
    return losses, [run.step.iteration, *run.step.tensors(), *advice, torch.get_rng_state()], states


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "ce"},
        {"method": "mfrw-mes"},
        {"method": "mw-net", "nan_policy": "ignore", "clip_grad_norm": 1.0},
        {"method": "l2rw"},
        {"method": "elr"},
        {"schedule": "cosine", "warmup_epochs": 1, "layer_decay": 0.9},
        {"approx_meta": True, "validate_meta_every": 7},
        {"accumulate": 2},
    ],
    ids=lambda settings: " ".join(f"{key}={value}" for key, value in settings.items()),
)
def test_replays_are_the_iterations_they_stand_for(settings):
    replayed = make(**settings)
    got = taken(replayed, 11)
    assert replayed.take.reason is None
    assert replayed.take.replays >= 3
    eager = make(**settings)
    eager.take.warm_up = 100
    want = taken(eager, 11)
    assert eager.take.replays == 0
    assert got[0] == want[0]
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=0)
    torch.testing.assert_close(got[2], want[2], rtol=0, atol=0)


def test_a_meta_loss_comes_with_meta_steps_alone():
    run = make(approx_meta=True, validate_meta_every=0)
    losses, _, _ = taken(run, 16)
    assert [meta is not None for _, meta in losses] == [True, False] * 8
    assert run.take.replays == 10  # of two kinds, after three of each


def test_a_resumed_run_is_recorded_anew(tmp_path):
    run = make()
    taken(run, 5)
    run.epoch, path = 0, tmp_path / "state.pt"
    checkpoint.save(path, run.state())
    want = taken(run, 5)
    run.restore(path)
    got = taken(run, 5)
    assert got[0] == want[0]
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=0)


def test_bad_numbers_in_a_replay_do_not_reach_the_weights():
    check_bad_numbers_reach_no_weight(make(method="mfrw-mes"))


def test_what_cannot_be_recorded_says_why():
    with pytest.raises(UserError, match=r"--cuda-graph on: .*--nan-policy skip"):
        make(nan_policy="skip")
    with pytest.raises(UserError, match="chooses the layers"):
        make(approx_meta=True, approx_layers="random", model="resnet20")
    with pytest.raises(UserError, match="float16"):
        make(amp=True, amp_dtype="float16")


def test_a_recording_that_fails_leaves_an_eager_run(monkeypatch):
    def fail(self, run):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graph.StandIn, "capture", fail)
    run, said = make(approx_meta=True, validate_meta_every=100), []
    run.take._say = said.append
    taken(run, 12)
    assert run.step.engine.meta_steps == 6
    assert run.take.replays == 0
    assert len(said) == 1
    assert "one operation at a time" in said[0]
    assert "stream is capturing" in said[0]


def test_weights_in_new_tensors_are_noticed():
    run = make(method="ce")
    compute = run.step.compute

    def moving(train, meta):
        run.model.model.fc.weight.data = run.model.model.fc.weight.data.clone()
        return compute(train, meta)

    run.step.compute = moving
    taken(run, 5)
    assert "new tensors" in run.take.reason


def test_a_whole_run(tmp_path):
    settings = {**QUIET, "epochs": 2, "approx_meta": True}
    result = train_config(resolve(Config, **settings, output=str(tmp_path / "run")))
    assert result.summary["cuda_graph"] is True
    usual = train_config(resolve(Config, **{**settings, "cuda_graph": "auto"}, output=str(tmp_path / "usual")))
    assert usual.summary["cuda_graph"] is False


@pytest.mark.parametrize("prepares", [False, True])
def test_graphs_are_of_the_epoch_for_which_a_method_prepares(tmp_path, monkeypatch, prepares):
    """What it keeps on the host is a constant of a graph; the stand-in, which calls Python again, cannot show that."""
    if prepares:
        monkeypatch.setattr(METHODS["ce"], "begin_epoch", lambda self, clock: None)
    resets, reset = [], cuda_graph.Graphed.reset
    monkeypatch.setattr(cuda_graph.Graphed, "reset", lambda self: resets.append(self.replays) or reset(self))
    train_config(resolve(Config, **QUIET, method="ce", epochs=2, output=str(tmp_path / "run")))
    assert len(resets) == (2 if prepares else 0)
