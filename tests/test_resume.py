"""What a preemptible job types, a run that is to be longer, and weights from elsewhere."""

import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

import fastadvisor
from fastadvisor import cli
from fastadvisor.config import Config, resolve
from fastadvisor.errors import Interrupted, UserError
from fastadvisor.models import build_model
from fastadvisor.runtime import checkpoint
from fastadvisor.runtime.interruption import Interruption
from fastadvisor.trainer import Trainer

QUIET = {"progress": False, "tensorboard": False, "device": "cpu", "method": "ce"}


def stopped_after(monkeypatch, iteration, output, **settings):
    """Train until a signal comes in the step with that number."""
    call = Trainer._watched_step

    def step(self, train, meta):
        if self.step.iteration + 1 == iteration:
            self.interruption.signal = signal.SIGTERM
        return call(self, train, meta)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_watched_step", step)
        with pytest.raises(Interrupted):
            fastadvisor.train(output=str(output), **{**QUIET, **settings})


def same(one, other):
    states = [torch.load(run / "last.pt", weights_only=True) for run in (one, other)]
    assert states[0]["iteration"] == states[1]["iteration"]
    for part in ("model", "optimizer"):
        pairs = zip(*(torch.utils._pytree.tree_leaves(state[part]) for state in states), strict=True)
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


# --resume auto


def test_auto_begins_what_is_not_there_and_goes_on_with_what_is(tmp_path, monkeypatch):
    whole, part = tmp_path / "whole", tmp_path / "part"
    fastadvisor.train(output=str(whole), epochs=3, **QUIET)
    stopped_after(monkeypatch, 6, part, epochs=3, resume="auto")
    result = fastadvisor.train(output=str(part), epochs=3, resume="auto", **QUIET)
    assert result.summary["epochs"] == 3
    same(whole, part)
    again = fastadvisor.train(output=str(part), epochs=3, resume="auto", **QUIET)  # of a finished run nothing is left to do
    assert again.summary["test_top1"] == result.summary["test_top1"]


def test_auto_begins_again_what_was_cut_off_before_its_first_save(tmp_path, monkeypatch):
    run, whole = tmp_path / "run", tmp_path / "whole"

    def killed(self, *args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "set_lr", killed)
        with pytest.raises(KeyboardInterrupt):
            fastadvisor.train(output=str(run), epochs=2, resume="auto", **QUIET)
    assert {path.name for path in run.iterdir()} == {"config.yaml", "run.json"}
    (run / "best.pt").write_bytes(b"the first save writes it before last.pt")
    fastadvisor.train(output=str(run), epochs=2, resume="auto", **QUIET)
    fastadvisor.train(output=str(whole), epochs=2, **QUIET)
    same(whole, run)


def test_auto_in_an_empty_folder_and_in_a_strange_one(tmp_path):
    (tmp_path / "empty").mkdir()
    fastadvisor.train(output=str(tmp_path / "empty"), epochs=1, resume="auto", **QUIET)
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"is not empty \(it holds thesis.tex\)"):
        fastadvisor.train(output=str(strange), epochs=1, resume="auto", **QUIET)
    with pytest.raises(UserError, match="--resume auto looks for the run in a folder; name it with --output"):
        fastadvisor.train(epochs=1, resume="auto", **QUIET)
    with pytest.raises(UserError, match=r"lr is .* resume with the settings of the run"):
        fastadvisor.train(output=str(tmp_path / "empty"), epochs=1, lr=0.7, resume="auto", **QUIET)


@pytest.mark.parametrize(
    ("words", "resume"),
    [
        ([], False),
        (["--resume"], True),
        (["--resume", "auto"], "auto"),
        (["--resume=auto"], "auto"),
        (["--resume", "--epochs", "3"], True),
        (["--no-resume"], False),
        (["--resume", "--no-resume"], False),
    ],
)
def test_the_words_on_the_command_line(words, resume):
    assert cli.parse_config(Config, "train", "", [*words, "--output", "x"]).resume == resume
    assert cli.parse_config(Config, "train", "", ["--output", "x", *words]).resume == resume


def test_a_word_that_is_none(capsys):
    assert cli.main(["train", "--resume", "later", "--output", "x"]) == 2
    assert "later" in capsys.readouterr().err
    assert cli.main(["train", "--resume=later", "--output", "x"]) == 2
    assert "later" in capsys.readouterr().err


def test_a_comparison_resumes_by_itself(tmp_path):
    settings = {**QUIET, "epochs": 1, "output": str(tmp_path / "runs"), "resume": "auto"}
    settings.pop("method")
    fastadvisor.compare(methods="ce", **settings)
    before = (tmp_path / "runs/ce-seed0/last.pt").stat().st_mtime_ns
    result = fastadvisor.compare(methods="ce,meta-only", **settings)
    assert [row["method"] for row in result["rows"]] == ["ce", "meta-only"]
    assert (tmp_path / "runs/ce-seed0/last.pt").stat().st_mtime_ns == before


# Longer


def test_a_constant_rate_may_go_on(tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    usual = {**QUIET, "schedule": "constant", "warmup_epochs": 0.5}
    fastadvisor.train(output=str(whole), epochs=4, **usual)
    fastadvisor.train(output=str(part), epochs=2, **usual)
    result = fastadvisor.train(output=str(part), epochs=4, resume=True, **usual)
    assert result.summary["epochs"] == 4
    same(whole, part)
    assert resolve(Config, str(part / "config.yaml")).epochs == 4
    fastadvisor.train(str(part / "config.yaml"), output=str(part), resume=True)  # the new length is the run's


def test_a_run_whose_length_was_given_in_iterations_goes_on_by_epochs(tmp_path):
    run = tmp_path / "run"
    assert fastadvisor.train(output=str(run), iterations=9, schedule="constant", **QUIET).summary["epochs"] == 2
    assert cli.main(["train", "--config", str(run / "config.yaml"), "--output", str(run), "--resume", "--epochs", "3"]) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    assert (resolve(Config, run / "config.yaml").epochs, resolve(Config, run / "config.yaml").iterations) == (3, None)


def test_steps_may_lie_further_on_if_none_has_been_passed(tmp_path, monkeypatch):
    whole, part = tmp_path / "whole", tmp_path / "part"
    usual = {**QUIET, "schedule": "step", "milestones": (0.75,)}
    fastadvisor.train(output=str(whole), epochs=6, **usual)
    stopped_after(monkeypatch, 7, part, epochs=4, **usual)
    fastadvisor.train(output=str(part), epochs=6, resume=True, **usual)
    same(whole, part)


@pytest.mark.parametrize(
    ("settings", "epoch"),
    [
        ({"schedule": "step", "milestones": (0.5,)}, 2),
        ({"schedule": "cosine"}, 1),
        ({"schedule": "constant", "method": "finetune", "finetune_fraction": 0.5}, 2),
    ],
)
def test_a_schedule_that_would_have_been_another_names_the_way(tmp_path, settings, epoch):
    run = tmp_path / "a run"
    usual = {**QUIET, **settings}
    fastadvisor.train(output=str(run), epochs=2, **usual)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(UserError) as error:
        fastadvisor.train(output=str(run), epochs=4, resume=True, **usual)
    assert f"--epochs 4 in place of 2 would have trained epoch {epoch} at another rate, or on other images" in str(error.value)
    assert str(error.value).endswith(f"--weights '{run}/last.pt' --output NEW.")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    fastadvisor.train(output=str(tmp_path / "new"), epochs=1, weights=f"{run}/last.pt", **usual)  # that way works


def test_a_run_cannot_be_shorter_than_it_is(tmp_path):
    usual = {**QUIET, "schedule": "constant"}
    fastadvisor.train(output=str(tmp_path / "run"), epochs=3, **usual)
    with pytest.raises(UserError, match="The run has trained 3 epochs, and --epochs 2 is less"):
        fastadvisor.train(output=str(tmp_path / "run"), epochs=2, resume=True, **usual)


# SIGHUP


def test_the_terminal_may_go(tmp_path, monkeypatch):
    call = Trainer._watched_step

    def step(self, train, meta):
        if self.step.iteration + 1 == 6:
            os.kill(os.getpid(), signal.SIGHUP)
        return call(self, train, meta)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_watched_step", step)
        with pytest.raises(Interrupted) as stopped:
            fastadvisor.train(output=str(tmp_path / "part"), epochs=3, **QUIET)
    assert stopped.value.signal == signal.SIGHUP
    assert "Stopped by SIGHUP after iteration 6" in str(stopped.value)
    fastadvisor.train(output=str(tmp_path / "part"), epochs=3, resume=True, **QUIET)
    fastadvisor.train(output=str(tmp_path / "whole"), epochs=3, **QUIET)
    same(tmp_path / "whole", tmp_path / "part")


def test_a_signal_that_is_ignored_stays_so():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interruption = Interruption()
        with interruption.watched():
            signal.raise_signal(signal.SIGHUP)
            assert interruption.signal is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# Weights


def wrapped(state):
    prefixed = {prefix: {prefix + key: value for key, value in state.items()} for prefix in checkpoint.PREFIXES}
    return {
        "plain": state,
        "DataParallel": prefixed["module."],
        "torch.compile": prefixed["_orig_mod."],
        "both": {f"module._orig_mod.{key}": value for key, value in state.items()},
        "Lightning": {"state_dict": prefixed["model."], "epoch": 3, "hyper_parameters": {"lr": 0.1}},
        "torchvision": {"model": state, "optimizer": {"state": {}}, "epoch": 3},
        "timm": {"state_dict": state, "arch": "resnet8", "metric": 71.3},
        "a common way": {"model_state_dict": prefixed["module."], "loss": 0.3},
    }


@pytest.mark.parametrize("kind", wrapped({}))
def test_weights_in_what_other_trainers_wrap_them_in(tmp_path, kind):
    torch.manual_seed(3)
    source = build_model(resolve(Config, model="resnet8"), 10, (8, 8)).model
    torch.save(wrapped(source.state_dict())[kind], tmp_path / "weights.pth")
    target = build_model(resolve(Config, model="resnet8"), 10, (8, 8)).model
    checkpoint.load_weights(target, str(tmp_path / "weights.pth"))
    for one, other in zip(source.state_dict().values(), target.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_weights_of_another_model_are_named(tmp_path):
    torch.save({"state_dict": {"module.fc.weight": torch.zeros(3, 2)}}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"first differing key conv1.weight: missing there"):
        checkpoint.load_weights(build_model(resolve(Config, model="resnet8"), 10, (8, 8)).model, str(tmp_path / "weights.pth"))


def test_a_model_with_names_of_its_own_that_look_like_a_wrapper(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Linear(2, 2)

    source, target = Model(), Model()
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    checkpoint.load_weights(target, str(tmp_path / "weights.pth"))
    assert torch.equal(source.model.weight, target.model.weight)


def test_a_file_with_objects_in_it_says_what_to_save(tmp_path):
    torch.save({"state_dict": {}, "args": Path("x")}, tmp_path / "weights.pth")
    with pytest.raises(
        UserError, match=r"holds objects other than tensors .*pathlib.*torch.save\(model.state_dict\(\), FILE\)"
    ):
        checkpoint.load_weights(nn.Linear(1, 1), str(tmp_path / "weights.pth"))
