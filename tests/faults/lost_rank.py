"""Kill one of two ranks in the middle of a training, and see how soon the other has ended.

python -m tests.faults.lost_rank [--times 3]
"""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.kills import ENVIRONMENT, QUIET, default_interrupt


def seconds_to_end(rank, output):
    """Kill ``rank`` once an epoch is done; return the seconds until torchrun has ended."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fastadvisor", "train", *QUIET]
    process = subprocess.Popen(
        [*command, "--epochs", "5000", "--output", str(output)],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=default_interrupt,
    )
    while not (output / "metrics.jsonl").is_file():
        time.sleep(0.05)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    began = time.monotonic()
    subprocess.run(["kill", f"-{int(signal.SIGKILL)}", ranks[rank]], check=True)
    assert process.wait(timeout=120) != 0
    return time.monotonic() - began


def main():
    parser = argparse.ArgumentParser(description="How soon a run of two ranks ends when one is killed.")
    parser.add_argument("--times", type=int, default=3)
    args = parser.parse_args()
    for number in range(args.times):
        with tempfile.TemporaryDirectory() as folder:
            print(
                f"rank {number % 2} killed: all ended after {seconds_to_end(number % 2, Path(folder) / 'run'):.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
