"""``torchrun -m fastadvisor train``, as a user starts it, on two ranks."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from fastadvisor.commands.replay import replay
from tests.distributed.test_equivalence import PATHS, torchrun
from tests.faults import kills

TRAIN = ["train", "--device", "cpu", "--no-tensorboard", "--epochs", "3", "--lr", "0.02"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run of two ranks that nobody disturbed, and what it printed."""
    folder = tmp_path_factory.mktemp("two") / "run"
    done = torchrun(2, "fastadvisor", *TRAIN, "--sync-bn", "--output", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def alike(one, two):
    """Equal but for the order of float32 sums."""
    ours, theirs = (torch.load(run / "model.pt", weights_only=True) for run in (one, two))
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=2e-3, atol=2e-3)


def test_two_ranks_train_what_one_would(two, tmp_path):
    folder, printed = two
    assert printed.count("epoch   3/3") == printed.count("Finished") == 1
    assert "2 processes with 50 images each" in printed
    assert {path.name for path in folder.iterdir()} == {
        *("config.yaml", "run.json", "metrics.jsonl", "summary.json", "last.pt", "best.pt", "model.pt")
    }
    one = torchrun(1, "fastadvisor", *TRAIN, "--sync-bn", "--output", tmp_path / "run")
    assert one.returncode == 0, one.stderr[-3000:]
    alike(folder, tmp_path / "run")
    summaries = [json.loads((run / "summary.json").read_text()) for run in (folder, tmp_path / "run")]
    assert summaries[0]["test_size"] == summaries[1]["test_size"]
    # Hits are whole numbers of 497 images: a borderline one may fall otherwise, a lost or doubled image would show in all.
    assert summaries[0]["test_top1"]["last"] == pytest.approx(summaries[1]["test_top1"]["last"], abs=2.5 * 100 / 497)
    assert round(summaries[0]["test_top1"]["last"] * 4.97, 6) == round(summaries[0]["test_top1"]["last"] * 4.97)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("kill", ""),
        ("raise", "ArithmeticError: a mistake of ours"),
        ("refuse", "photo"),
        ("memory", "--batch-size 50 fits (it was tried)"),
    ],
)
def test_one_rank_fails_and_all_end_quickly_with_its_message(tmp_path, fault, says):
    began = time.monotonic()
    faults = {"FAULT": fault, "FAULT_RANK": "1", "FAULT_ITERATION": "6"}
    done = torchrun(2, "tests.distributed.faulty", *TRAIN, "--output", tmp_path / "run", **faults)
    assert done.returncode != 0
    assert says in done.stderr
    assert done.stderr.count("Traceback") - done.stderr.count("torch.distributed.elastic.multiprocessing.errors") <= 2
    assert "[rank0]: Traceback" not in done.stderr
    if fault == "refuse":
        assert done.stderr.count("This rank has a photo it cannot read") == 1
    assert time.monotonic() - began < 100  # far under the two hours of a collective's timeout


def test_the_rank_with_the_bad_numbers_is_named_and_its_batch_replayed(tmp_path):
    faults = {"FAULT": "nan", "FAULT_RANK": "1", "FAULT_ITERATION": "6"}
    done = torchrun(2, "tests.distributed.faulty", *TRAIN, "--output", tmp_path / "run", **faults)
    assert done.returncode != 0
    assert done.stderr.count("Iteration 6 (epoch 2): the advisor's mask is not finite.") == 1
    found = replay(tmp_path / "run", device="cpu")
    assert (found["rank"], found["said"], found["found"]) == (1, "the advisor's mask", "the advisor's mask")
    assert found["first"] == "classifier conv1 (Conv2d)"
    assert f"ids {', '.join(map(str, found['ids'][:8]))}, ..." in done.stderr


def test_a_restart_by_torchrun_goes_on_from_the_last_save(two, tmp_path):
    faults = {"FAULT": "kill", "FAULT_RANK": "1", "FAULT_ITERATION": "7"}
    done = torchrun(
        2,
        "tests.distributed.faulty",
        *TRAIN,
        *("--sync-bn", "--save-every", "3", "--output", tmp_path / "run"),
        before=("--max-restarts", "1"),
        **faults,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    parts = json.loads((tmp_path / "run" / "run.json").read_text())["parts"]
    assert [part["iteration"] for part in parts] in ([0, 4], [0, 6])  # saves are agreed on one iteration late
    assert kills.same(*(torch.load(run / "model.pt", weights_only=True) for run in (two[0], tmp_path / "run")))


def test_two_trainings_and_a_dry_run_one_after_the_other(tmp_path):
    program = tmp_path / "several.py"
    program.write_text(
        "import sys, fastadvisor\n"
        "from fastadvisor import cli\n"
        "ends = []\n"
        "for name in 'ab':\n"
        "    settings = dict(epochs=1, device='cpu', tensorboard=False, output=f'{sys.argv[1]}/{name}')\n"
        "    ends.append(fastadvisor.train(**settings).summary['test_top1'])\n"
        "assert ends[0] == ends[1]\n"
        "assert cli.main(['train', '--dry-run', '--device', 'cpu']) == 0\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", program, tmp_path]
    environment = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Finished") == 2
    assert done.stdout.count("Dry run") == 1


def test_two_ranks_go_on_where_one_was_killed_as_one_would_have(two, tmp_path):
    faults = {"FAULT": "kill", "FAULT_RANK": "0", "FAULT_ITERATION": "7"}
    command = [*TRAIN, "--sync-bn", "--save-every", "3", "--output", tmp_path / "run"]
    assert torchrun(1, "tests.distributed.faulty", *command, **faults).returncode != 0
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["iteration"] == 6
    done = torchrun(2, "fastadvisor", *command, "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    alike(two[0], tmp_path / "run")


def test_a_signal_to_torchrun_saves_and_another_number_of_ranks_goes_on(two, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fastadvisor", *TRAIN, "--sync-bn"]
    surroundings = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
    output = tmp_path / "run"
    process = subprocess.Popen(
        [*command, "--epochs", "300", "--output", str(output)], env=surroundings, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 100
    while not (output / "metrics.jsonl").is_file() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert err.count("fastadvisor: Stopped by SIGTERM after iteration") == 1, err[-3000:]
    done = int(err.split("after iteration ")[1].split()[0])
    assert torch.load(output / "last.pt", weights_only=True)["iteration"] == done
    environment = {**surroundings, "PYTHONPATH": PATHS}
    resume = [sys.executable, "-m", "fastadvisor", *TRAIN, "--sync-bn", "--epochs", "300", "--output", str(output), "--resume"]
    alone = subprocess.Popen(resume, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=kills.default_interrupt)
    before = len((output / "metrics.jsonl").read_text().splitlines())
    while len((output / "metrics.jsonl").read_text().splitlines()) <= before and time.monotonic() < until + 100:
        time.sleep(0.05)
    alone.send_signal(signal.SIGINT)
    _, err = alone.communicate(timeout=100)
    assert alone.returncode == 130, err
    assert int(err.split("after iteration ")[1].split()[0]) > done


def test_what_the_user_can_put_right_is_said_once(tmp_path):
    done = torchrun(2, "fastadvisor", *TRAIN, "--batch-size", "99", "--output", tmp_path / "run")
    assert done.returncode != 0
    said = "fastadvisor: error: --batch-size 99 cannot be shared evenly by 2 processes: make it a multiple of 2."
    assert done.stderr.count(said) == 1
    assert not (tmp_path / "run").exists()
    done = torchrun(2, "fastadvisor", "compare", "--methods", "ce")
    assert done.stderr.count("fastadvisor compare trains in one process") == 1
