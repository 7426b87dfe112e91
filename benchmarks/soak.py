"""Whether a loader's memory stays flat: many images once through it, the memory of all its processes on the way.

    python -m benchmarks.soak [--loader dali|torch] [--images 200000] [--side 256] [--json FILE]

The files are a few hundred generated JPEGs under as many names as asked for (hard links), so that tables of paths and labels
have their real size. Memory is the proportional set of this process and its children: what is shared counts once.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.loaders import Setting
from benchmarks.photos import write_benchmark_set
from benchmarks.tables import about, command
from fastadvisor.loading.backends import dali
from fastadvisor.runtime.allocator import keep_freed_memory
from fastadvisor.runtime.environment import cpu_cores
from fastadvisor.runtime.precision import pick_device

DIFFERENT = 400
"""JPEGs that are generated."""

SAMPLES = 40
"""Times that memory is looked at."""


def memory_mb() -> float:
    """Return the proportional set size of this process and its children, MiB."""
    pids = [os.getpid()]
    for task in Path("/proc/self/task").iterdir():
        pids += [int(pid) for pid in (task / "children").read_text().split()]
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1024


def many_names(root: Path, images: int, side: int) -> Path:
    """Write a set of ``images`` training files."""
    write_benchmark_set(root, side, DIFFERENT)
    files = sorted((root / "train").rglob("*.jpg"))
    for number in range(DIFFERENT, images):
        file = files[number % DIFFERENT]
        os.link(file, file.with_name(f"{number:07}.jpg"))
    return root


def soak(loader: str, root: Path, images: int, workers: int, batch_size: int) -> dict[str, Any]:
    """Take one epoch of the training images; return seconds, images a second, and memory on the way."""
    setting = Setting(root, pick_device("auto"), batch_size)
    with setting.opened(loader, workers) as loaders:
        steps = images // batch_size
        seen, memory = 0, []
        began = time.perf_counter()
        for step in range(steps):
            seen += len(loaders.train.next_batch().ids)
            if step % max(1, steps // SAMPLES) == max(1, steps // SAMPLES) - 1:
                memory.append([seen, round(memory_mb(), 1)])
        seconds = time.perf_counter() - began
        return {
            "loader": loader,
            "workers": workers,
            "seen": seen,
            "seconds": seconds,
            "images_per_second": seen / seconds,
            "memory": memory,
        }


def report(result: dict[str, Any]) -> str:
    """Return the measurement as Markdown."""
    where, memory = result["environment"], result["memory"]
    half = [value for _, value in memory[len(memory) // 2 :]]
    return "\n".join(
        [
            f"    {result['command']}",
            "",
            f"{where['processor']}, {where['cpu_cores']} cores; torch {where['torch']}, DALI {where['nvidia-dali']}; "
            f"commit {where['commit']}. {result['loader']}, {result['workers']} workers: {result['seen']:,} images in "
            f"{result['seconds']:.0f} s ({result['images_per_second']:,.0f} images/s).",
            "",
            f"Memory (proportional set, all processes): {memory[0][1]:,.0f} MiB after {memory[0][0]:,} images, "
            f"{min(half):,.0f} to {max(half):,.0f} MiB over the second half, {memory[-1][1]:,.0f} MiB in the end.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; with ``--json``, write too."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loader", choices=["dali", "torch"], default="dali" if dali.available() else "torch")
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--workers", type=int, default=cpu_cores())
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--json", type=Path)
    plan = parser.parse_args(arguments)
    if pick_device("auto").type == "cpu":
        keep_freed_memory()  # as a training run does
    with tempfile.TemporaryDirectory() as scratch:
        root = many_names(Path(scratch), plan.images, plan.side)
        result = soak(plan.loader, root, plan.images, plan.workers, plan.batch_size)
    result |= {"command": command(arguments, "benchmarks.soak"), "environment": about()}
    print(report(result))
    if plan.json:
        plan.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
