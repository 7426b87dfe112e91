"""Peak memory of one contender, in a process of its own.

    python -m benchmarks.peak_memory exact --model resnet32 --batch-size 256

Prints JSON: ``peak_mb``, what model, batches, optimizers and two cycles of the iteration need at most (MiB), and
``peak_raw_mb``, the whole process. On a GPU both come from torch's allocator. On the CPU the peak is the resident set's, less
the resident set right before model and batches were built; by then torch is imported and the same contender has run at a
tiny size, so that libraries, thread pools and scripted formulas are not taken for the step's. In the child every tensor over
64 KiB is a mapping of its own (``MALLOC_MMAP_THRESHOLD_``), so that the resident set is what is in use, as an allocator's peak
is; glibc's own choice keeps holes that depend on what ran before (a plain step then takes 1.7 to 1.9 times as much).
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.contenders import CONTENDERS, Setting, Unavailable, batches, iterate, require
from fastadvisor.runtime.memory import STATUS, peak_mb, reset_peak
from fastadvisor.runtime.precision import pick_device

CYCLES = 2  # the first makes the optimizers' state, the second runs beside it
WARM_MODEL, WARM_BATCH = "resnet8", 2
TIMEOUT_S = 3600


def resident_mb(device: torch.device) -> float | None:
    """Return what is in use now, MiB: torch's allocations on a GPU, else the resident set (None where it is not told)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    if STATUS.is_file():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
    return None


def run_cycles(name: str, setting: Setting, batch_size: int, cycles: int) -> None:
    """Build the contender ``name`` and its batches, and run ``cycles`` of its cycles."""
    contender = CONTENDERS[name]
    iteration = contender.build(setting)
    train, meta = batches(batch_size, setting.device, setting.dtype)
    for _ in range(cycles * contender.iterations_per_cycle):
        iterate(contender, iteration, train, meta)


def peak_here(name: str, setting: Setting, batch_size: int) -> dict[str, float | None]:
    """Measure in this process, which should be a fresh one."""
    require(CONTENDERS[name])
    run_cycles(name, Setting(WARM_MODEL, setting.device, setting.amp), WARM_BATCH, 1)
    gc.collect()
    reset_peak(setting.device)
    before = resident_mb(setting.device)
    run_cycles(name, setting, batch_size, CYCLES)
    raw = peak_mb(setting.device)
    return {"peak_mb": None if raw is None or before is None else raw - before, "peak_raw_mb": raw}


def peak_in_child(name: str, setting: Setting, batch_size: int) -> dict[str, float | None]:
    """Measure in a fresh process.

    Raises:
        Unavailable: the process failed; the message says how.
    """
    command = [sys.executable, "-m", "benchmarks.peak_memory", name, "--model", setting.model]
    command += ["--batch-size", str(batch_size), "--device", str(setting.device), *(["--amp"] if setting.amp else [])]
    # The child imports from where this process imports, and computes with as many threads.
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"memory not measured, its process took more than {TIMEOUT_S} s") from None
    if done.returncode:
        raise Unavailable(f"memory not measured, {_why(done)}")
    measured: dict[str, float | None] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _why(done: "subprocess.CompletedProcess[str]") -> str:
    if done.returncode < 0:
        return f"its process was ended by signal {-done.returncode}" + (" (out of memory?)" if done.returncode == -9 else "")
    said = done.stderr.strip().splitlines()
    return f"its process failed: {said[-1][:200]}" if said else f"its process ended with status {done.returncode}"


def main() -> None:
    """Measure here and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(CONTENDERS))
    parser.add_argument("--model", default="resnet32")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", action="store_true")
    options = parser.parse_args()
    setting = Setting(options.model, pick_device(options.device), options.amp)
    try:
        print(json.dumps(peak_here(options.name, setting, options.batch_size)))
    except Unavailable as reason:
        raise SystemExit(f"{options.name}: {reason}") from None


if __name__ == "__main__":
    main()
