"""A run that is stopped, killed or asked to save, and goes on as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from fastadvisor.commands.train import train_config
from fastadvisor.config import Config, resolve
from fastadvisor.datasets import load_source, prepare
from fastadvisor.errors import Interrupted, UserError
from fastadvisor.iterations import Iteration
from fastadvisor.runtime import checkpoint
from fastadvisor.runtime.interruption import Action, Interruption, SaveClock
from fastadvisor.runtime.ranks import ALONE
from fastadvisor.training.trainer import Trainer
from tests.faults import flips, kills

QUIET = {"progress": False, "tensorboard": False, "device": "cpu"}


def settings(output, **changes):
    return resolve(Config, **{**QUIET, "epochs": 3, "output": str(output), **changes})


def after(monkeypatch, iteration, what):
    """Do ``what`` in the middle of the step with that number (counted over both parts of a run)."""
    call = Iteration.__call__

    def spy(self, train, meta):
        if self.iteration + 1 == iteration:
            what()
        return call(self, train, meta)

    monkeypatch.setattr(Iteration, "__call__", spy)


@pytest.mark.parametrize("iteration", [1, 6, 8, 12])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_the_iteration_saves_and_says_resume_command(tmp_path, monkeypatch, iteration, number):
    changes = {"method": "mfrw-mes", "ema_decay": 0.9}
    whole = train_config(settings(tmp_path / "whole", **changes))
    before = signal.getsignal(number)
    after(monkeypatch, iteration, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted) as stopped:
        train_config(settings(tmp_path / "part", **changes))
    assert stopped.value.signal == number
    assert signal.getsignal(number) is before
    epoch = (iteration - 1) // 4 + 1
    assert f"Stopped by {number.name} after iteration {iteration} (epoch {epoch} of 3)" in str(stopped.value)
    assert str(stopped.value).endswith(f"--config {tmp_path}/part/config.yaml --output {tmp_path}/part --resume")
    monkeypatch.undo()
    torch.manual_seed(999)
    train_config(resolve(Config, str(tmp_path / "part" / "config.yaml"), output=str(tmp_path / "part"), resume=True))
    ends = [kills.left_by(tmp_path / name) for name in ("whole", "part")]
    assert kills.same(*ends)
    assert kills.same(*(torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("whole", "part")))
    parts = json.loads((tmp_path / "part" / "run.json").read_text())["parts"]
    assert [part["iteration"] for part in parts] == [0, iteration]
    assert whole.summary["test_top1"] == json.loads((tmp_path / "part" / "summary.json").read_text())["test_top1"]


@pytest.mark.parametrize(
    "changes",
    [
        {"loader": "torch", "workers": 1},
        {"approx_meta": True, "validate_meta_every": 1},
        {"approx_meta": True, "approx_layers": "learned", "approx_budget": 2, "meta_interval": 1},
        {"method": "l2rw", "accumulate": 1, "optimizer": "adamw", "warmup_epochs": 1.5, "lr": 1e-3},
        {"accumulate": 2, "clip_grad_norm": 0.5, "layer_decay": 0.7},
        {"amp": True, "amp_dtype": "float16"},
    ],
    ids=str,
)
def test_a_run_stopped_in_mid_epoch_goes_on_exactly(tmp_path, monkeypatch, changes):
    train_config(settings(tmp_path / "whole", epochs=2, **changes))
    after(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        train_config(settings(tmp_path / "part", epochs=2, **changes))
    monkeypatch.undo()
    train_config(settings(tmp_path / "part", epochs=2, resume=True, **changes))
    assert kills.same(*(kills.left_by(tmp_path / name) for name in ("whole", "part")))


def test_a_second_interrupt_does_not_wait():
    interruption = Interruption()
    with interruption.watched():
        signal.raise_signal(signal.SIGINT)
        assert interruption.signal is signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_process_that_is_stuck_ends_by_itself_and_one_that_moves_does_not():
    """In a process of its own: blocked where no Python handler runs, as in a collective that waits for a rank that is gone."""
    code = """
import ctypes, os, signal, sys, threading, time
from fastadvisor.runtime import interruption
from fastadvisor.runtime.ranks import Ranks
interruption.GRACE = 0.3
watch = interruption.Interruption()
with watch.watched(Ranks(0, 2)):
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    if sys.argv[1] == "moves":
        for _ in range(12):
            time.sleep(0.1)
            watch.steps += 1
        print(watch.signal.name)
    else:
        lock = ctypes.CDLL(None)
        until = time.time() + 5
        while time.time() < until:
            lock.sleep(5)  # outside of Python
        print("still here")
"""
    found = [
        subprocess.run(
            [sys.executable, "-c", code, way], env=kills.ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
        )
        for way in ("moves", "stuck")
    ]
    assert (found[0].returncode, found[0].stdout) == (0, "SIGTERM\n")
    assert (found[1].returncode, found[1].stdout) == (143, "")


def test_off_the_main_thread_signals_are_left_alone():
    found = []

    def watch():
        with Interruption().watched() as interruption:
            found.append(interruption.signal)

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert found == [None]


def test_the_clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    interruption = Interruption()
    clock = SaveClock(interruption, 10.0, 0, ALONE)
    assert clock.decide(1) is Action.NOTHING
    now[0] += 599
    assert clock.decide(2) is Action.NOTHING
    now[0] += 2
    assert clock.decide(3) is Action.SAVE
    clock.saved()
    assert clock.decide(4) is Action.NOTHING
    assert [SaveClock(interruption, 0.0, 3, ALONE).decide(iteration) for iteration in range(1, 7)] == [0, 0, 1, 0, 0, 1]
    interruption.signal = signal.SIGTERM
    assert clock.decide(5) is Action.STOP


def test_keep_leaves_the_newest_checkpoints(tmp_path):
    train_config(settings(tmp_path / "run", save_every=2, keep=3))
    kept = checkpoint.list_kept(tmp_path / "run")
    assert [path.name for path in kept] == [f"iteration-{number:09d}.pt" for number in (12, 10, 8)]
    assert kept[0].samefile(tmp_path / "run" / "last.pt")
    assert [checkpoint.load(path)["iteration"] for path in kept] == [12, 10, 8]
    last = tmp_path / "run" / "last.pt"
    last.write_bytes(last.read_bytes()[:-100])  # and with it iteration 12, the same file
    with pytest.raises(UserError, match=r"last.pt is damaged.*copy .*iteration-000000010.pt over it"):
        train_config(settings(tmp_path / "run", save_every=2, keep=3, resume=True))


def test_a_killed_run_ends_as_if_nothing_had_happened(tmp_path):
    """Three kills; ``python -m tests.faults.kills`` makes fifty (docs/reliability.md)."""
    flags = ["--save-every", "2", "--epochs", "40", "--method", "ce"]
    done, different = kills.torture(tmp_path, 3, flags, seed=1, longest=0.4)
    assert (done, different) == (3, [])


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become a user whom mode bits stop")
def test_a_folder_that_becomes_read_only_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)

    def lock():
        (tmp_path / "run").chmod(0o555)
        os.seteuid(65534)

    after(monkeypatch, 6, lock)
    try:
        with pytest.raises(UserError, match=r"run/.* cannot be written \(Permission denied\); free some space"):
            train_config(settings(tmp_path / "run"))
    finally:
        os.seteuid(0)
    (tmp_path / "run").chmod(0o755)
    assert checkpoint.load(tmp_path / "run" / "last.pt")["iteration"] == 4
    monkeypatch.undo()
    train_config(settings(tmp_path / "run", resume=True))


def test_what_a_killed_process_leaves_half_written_is_cleared(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.123.tmp").write_text("half")
    train_config(settings(tmp_path / "run", epochs=1))
    (tmp_path / "run" / ".last.pt.123.tmp").write_text("half")
    train_config(settings(tmp_path / "run", epochs=1, resume=True))
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_flipped_bytes_in_a_checkpoint(tmp_path):
    """``python -m tests.faults.flips`` does it a thousand times (docs/reliability.md)."""
    told = flips.torture(tmp_path, 60)
    assert sum(told.values()) == 60
    assert all(map(flips.is_fine, told)), told


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A trainer, and a checkpoint of its run."""
    config = settings(tmp_path_factory.mktemp("stopped") / "run", epochs=1, ema_decay=0.9)
    result = train_config(config)
    run = Trainer(config, prepare(load_source(config), config, config.seed), torch.device("cpu"))
    return run, result.folder / "last.pt"


def test_a_checkpoint_that_was_changed_by_hand(stopped, tmp_path):
    run, path = stopped
    good = torch.load(path, weights_only=True)
    others = ("x", None, 3.5, [], {"a": 1})
    spoiled = [(key, {name: value for name, value in good.items() if name != key}) for key in good]
    spoiled += [(key, {**good, key: other}) for key in good for other in others if type(other) is not type(good[key])]
    taken = []
    for key, state in spoiled:
        checkpoint.write(tmp_path / "last.pt", state)
        try:
            run.restore(tmp_path / "last.pt")
        except UserError:
            continue
        taken.append((key, state.get(key)))
    assert taken == []
