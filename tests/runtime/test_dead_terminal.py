"""A terminal that is closed, and a reader of a pipe that leaves, change neither a run nor its exit status."""

import os
import pty
import subprocess
import sys
import time

import pytest
import torch

from tests.faults import kills

FLAGS = ["--device", "cpu", "--no-tensorboard", "--method", "ce", "--model", "resnet8"]


def train(output, epochs):
    return [sys.executable, "-m", "fastadvisor", "train", *FLAGS, "--epochs", str(epochs), "--output", str(output)]


def begun(output):
    until = time.monotonic() + 120
    while not (output / "last.pt").is_file():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_run_whose_terminal_is_closed_saves_and_reports_the_signal(tmp_path):
    output = tmp_path / "run"
    pid, terminal = pty.fork()
    if pid == 0:  # with the terminal as its own: closing it sends SIGHUP, and writing to it fails from then on
        os.execvpe(sys.executable, train(output, 10_000), kills.ENVIRONMENT)
    os.set_blocking(terminal, False)
    begun(output)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 129
    state = torch.load(output / "last.pt", weights_only=True)
    assert state["iteration"] > 0


def test_a_run_outlives_the_reader_of_its_lines(tmp_path):
    """As ``fastadvisor train | head -1``."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = subprocess.Popen(train(tmp_path / "run", 3), env=kills.ENVIRONMENT, **pipes)
    running.stdout.readline()
    running.stdout.close()
    running.stderr.close()
    assert running.wait(timeout=120) == 0
    assert (tmp_path / "run" / "model.pt").is_file()


@pytest.mark.parametrize("command", ["recipes", "env"])
def test_a_list_whose_reader_leaves_ends_without_a_traceback(command):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "fastadvisor", command],
        env=kills.ENVIRONMENT,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
