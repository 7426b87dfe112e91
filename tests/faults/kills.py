"""Kill a training again and again at random moments, let it resume, and compare what it ends with.

    python -m tests.faults.kills [--kills 50] [--seed 0] [-- flags of fastadvisor train]

Prints a line a kill and, in the end, whether the weights, the advisor, the optimizers and the metrics are those of a run that
nobody disturbed. Exit status 1 if not, or if any life ended in a traceback or in anything but success or one sentence.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(str(path) for path in (ROOT, ROOT / "kernels")),
    "OMP_NUM_THREADS": "1",
}
TIMES = ("images_per_second", "waiting_share", "step_ms_median", "seconds")
QUIET = ["--device", "cpu", "--no-progress", "--no-tensorboard"]
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def start(output, flags):
    """Start a run, or the next part of one."""
    resume = ["--resume"] if (output / "config.yaml").is_file() else []
    command = [sys.executable, "-m", "fastadvisor", "train", *QUIET, *flags, "--output", str(output), *resume]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=default_interrupt
    )


def default_interrupt():
    """A job in the background of a shell ignores Ctrl-C; ours must not."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def left_by(output):
    """Return what a finished run has left: every tensor, and the metrics without their times."""
    state = torch.load(output / "last.pt", weights_only=True)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return state, [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def same(a, b):
    """Whether two checkpoints, or parts of them, are equal to the last bit; times aside."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key not in TIMES)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def life(output, flags, delay, number, say):
    """Run until ``delay`` seconds after the process has begun to train, then send signal ``number``; return whether it had
    finished before.
    """
    process = start(output, flags)
    mark = (output / "run.json").stat().st_mtime_ns if (output / "run.json").is_file() else 0
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if (output / "run.json").is_file() and (output / "run.json").stat().st_mtime_ns != mark:
            break
        time.sleep(0.005)
    deadline = time.monotonic() + delay
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    finished = process.poll() is not None
    if not finished:
        process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert "Traceback" not in err, err
    assert process.returncode in ((0,) if finished else (0, -number, 128 + number)), (process.returncode, err)
    say(f"{'finished' if process.returncode == 0 else signal.Signals(number).name} {delay:.2f} s into training")
    return process.returncode == 0


def torture(folder, kills, flags, seed=0, longest=1.0, say=print):
    """Kill so many times, let the run end, and return what differs from an undisturbed run (nothing, one hopes)."""
    random.seed(seed)
    whole, killed = folder / "whole", folder / "killed"
    assert start(whole, flags).wait(600) == 0
    done = 0
    while done < kills:
        if life(killed, flags, random.uniform(0, longest), random.choice(SIGNALS), partial(say, f"{done + 1}:")):
            break
        done += 1
    process = start(killed, flags)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    (state, metrics), (expected, expected_metrics) = left_by(killed), left_by(whole)
    different = [key for key in expected if not same(state[key], expected[key])]
    different += [] if metrics == expected_metrics else ["metrics.jsonl"]
    models = [torch.load(run / "model.pt", weights_only=True) for run in (whole, killed)]
    different += [] if same(*models) else ["model.pt"]
    best = [torch.load(run / "best.pt", weights_only=True)["epoch"] for run in (whole, killed)]
    different += [] if best[0] == best[1] else ["best.pt"]
    return done, different


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=1.0, help="seconds into training, at most")
    parser.add_argument("flags", nargs="*", default=["--save-every", "3", "--epochs", "150"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done, different = torture(Path(folder), args.kills, args.flags, args.seed, args.longest)
    print(f"{done} kills; " + (f"different: {', '.join(different)}" if different else "everything is equal to the last bit"))
    return 1 if different or done < args.kills else 0


if __name__ == "__main__":
    sys.exit(main())
