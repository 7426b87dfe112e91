"""Memory over a long training: resident set and live tensors every so many iterations.

    python -m tests.faults.soak [--iterations 10000] [--every 1000] [-- flags of fastadvisor train]

Trains the digits, tests and saves as a run does. Exit status 1 if the resident set grows by more than 2 % over the second half.
"""

import argparse
import gc
import sys
import tempfile
from pathlib import Path

import torch

from fastadvisor.cli import parse_config
from fastadvisor.commands.train import train_config
from fastadvisor.config import Config
from fastadvisor.iterations import Iteration


def resident_mb():
    """Resident set of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())  # isinstance would wake lazy modules


def soak(iterations, every, flags, say=print):
    """Return (iteration, MiB, live tensors) at every ``every``-th iteration."""
    seen = []
    call = Iteration.__call__

    def counting(self, train, meta):
        result = call(self, train, meta)
        if self.iteration % every == 0:
            seen.append((self.iteration, resident_mb(), live_tensors()))
            say(f"{self.iteration:8,} iterations  {seen[-1][1]:8.1f} MiB  {seen[-1][2]:6} tensors")
        return result

    Iteration.__call__ = counting
    try:
        with tempfile.TemporaryDirectory() as folder:
            usual = ["--device", "cpu", "--no-progress", "--no-tensorboard", "--output", str(Path(folder) / "run")]
            train_config(parse_config(Config, "train", "", ["--iterations", str(iterations), *flags, *usual]))
    finally:
        Iteration.__call__ = call
    return seen


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=1_000)
    parser.add_argument("flags", nargs="*", default=[])
    args = parser.parse_args()
    seen = soak(args.iterations, args.every, args.flags)
    half = [mb for iteration, mb, _ in seen if iteration >= args.iterations / 2]
    growth = max(half) / half[0] - 1
    print(f"Over the second half the resident set grew by {100 * growth:.2f} %.")
    return 1 if growth > 0.02 else 0


if __name__ == "__main__":
    sys.exit(main())
