"""What a training step costs with each way to the meta-gradient, beside plain cross-entropy.

    python -m benchmarks.step [--model resnet32] [--batch-size 128] [--json FILE] [--markdown FILE]

One process, the contenders in turn, medians. Before anything is timed each contender's meta-gradient is held against double
backward in float64 on the same network; one that is off is not timed. Peak memory is measured in processes of their own.
On a GPU without ``--amp`` or ``--no-amp``, float32 and bfloat16 autocast are both measured.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import checks, peak_memory
from benchmarks.contenders import CONTENDERS, Setting, Unavailable, batches, chosen, iterate
from benchmarks.tables import about, command, publish, report, suffixes_of
from fastadvisor.runtime.allocator import keep_freed_memory
from fastadvisor.runtime.precision import pick_device

GPU_CYCLES = 8


@dataclass
class Cycle:
    """What is timed together: ``iterations`` calls of ``run``."""

    run: Callable[[], object]
    iterations: int = 1


@dataclass
class Plan:
    """What to measure."""

    model: str = "resnet32"
    batch_size: int = 128
    rounds: int = 7
    amps: Sequence[bool] = (False,)
    """Precisions in turn: False float32, True bfloat16 autocast."""
    keep_memory: bool = True
    """CPU: keep freed memory in the process while timing, as a training run does."""
    memory_batch_size: int | None = 256
    """None: no memory."""
    only: str | None = None
    check_batch_size: int = 16
    channels_last: bool = False
    cycles: int = 1
    """How often a contender's iterations are repeated before the clock is read: on a GPU one of them is too short for it."""


def interleaved(cycles: Mapping[str, Cycle], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Run the contenders in turn, ``rounds`` times after one to warm up; return each one's milliseconds an iteration."""
    times: dict[str, list[float]] = {name: [] for name in cycles}
    gc.collect()
    gc.freeze()  # what is loaded so far: a collection that goes through it takes 170 ms
    for index in range(rounds + 1):
        for name, cycle in cycles.items():
            gc.collect()  # what one contender leaves in reference cycles is not cleared at the next one's expense
            elapsed = timed(cycle, device)
            if index:
                times[name].append(elapsed)
    gc.unfreeze()
    return times


def timed(cycle: Cycle, device: torch.device) -> float:
    """Run one cycle and return its milliseconds an iteration."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(cycle.iterations):
        cycle.run()
    synchronize(device)
    return 1000 * (time.perf_counter() - start) / cycle.iterations


def synchronize(device: torch.device) -> None:
    """Wait for the device, where there is something to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_cycle(name: str, setting: Setting, plan: Plan) -> Cycle:
    """Build the contender ``name`` and its batches."""
    contender = CONTENDERS[name]
    iteration = contender.build(setting)
    train, meta = batches(plan.batch_size, setting.device, memory_format=setting.memory_format)
    return Cycle(partial(iterate, contender, iteration, train, meta), plan.cycles * contender.iterations_per_cycle)


def timings(names: Sequence[str], setting: Setting, plan: Plan, suffix: str) -> dict[str, Any]:
    """Time ``names``; return median and quartiles by key, None for the contenders that are not among ``names``."""
    cycles = {name: make_cycle(name, setting, plan) for name in names}
    times = interleaved(cycles, plan.rounds, setting.device)
    result: dict[str, Any] = {}
    for name in CONTENDERS:
        values = times.get(name)
        result[f"{name}{suffix}_ms"] = statistics.median(values) if values else None
        result[f"{name}{suffix}_ms_quartiles"] = quartiles(values) if values else None
    return result


def quartiles(values: list[float]) -> list[float]:
    """Return the first and the third quartile."""
    if len(values) == 1:
        return values * 2
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def memory(names: Sequence[str], setting: Setting, batch_size: int | None, left_out: dict[str, str]) -> dict[str, Any]:
    """Measure peaks (MiB) in children; None, and a reason in ``left_out``, where one failed."""
    result: dict[str, Any] = {f"{name}_peak{raw}_mb": None for name in CONTENDERS for raw in ("", "_raw")}
    for name in names if batch_size else ():
        assert batch_size is not None
        try:
            peak = peak_memory.peak_in_child(name, setting, batch_size)
        except Unavailable as reason:
            left_out[name] = str(reason)
            continue
        result |= {f"{name}_{key}": value for key, value in peak.items()}
    return result


def measure(plan: Plan, device: torch.device) -> dict[str, Any]:
    """Check, measure memory, then time every contender; raises SystemExit if the exact engine is off."""
    names, last = chosen(plan.only, device), plan.channels_last
    checked = checks.correctness(names, plan.model, device, plan.check_batch_size, channels_last=last)
    left_out, settings = dict(checked.left_out), [Setting(plan.model, device, amp, channels_last=last) for amp in plan.amps]
    result = memory(checked.green, settings[0], plan.memory_batch_size, left_out)
    if plan.keep_memory and device.type == "cpu":
        keep_freed_memory()  # as a training run does
    precisions = ["bfloat16" if amp else "float32" for amp in plan.amps]
    for setting, suffix in zip(settings, suffixes_of(precisions), strict=True):
        result |= timings(checked.green, setting, plan, suffix)
    if plan.amps[0]:  # bfloat16 alone: under both names
        result |= {key.replace("_ms", "_amp_ms"): value for key, value in list(result.items()) if "_ms" in key}
    for name in CONTENDERS:
        result |= {f"{name}_error": checked.errors.get(name), f"{name}_cosine": checked.cosines.get(name)}
    return {
        **result,
        "timed": checked.green,
        "left_out": left_out,
        "model": plan.model,
        "batch_size": plan.batch_size,
        "memory_batch_size": plan.memory_batch_size,
        "rounds": plan.rounds,
        "amp": plan.amps[0],
        "precisions": precisions,
        "device": device.type,
        "keep_memory": plan.keep_memory,
        "channels_last": plan.channels_last,
        "iterations_a_cycle": plan.cycles,
        "environment": about(),
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet32")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 autocast only, or float32 only")
    parser.add_argument("--channels-last", action="store_true", help="images and weights in NHWC")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-keep-memory", action="store_true", help="CPU: let the C library return freed memory")
    parser.add_argument("--no-memory", action="store_true", help="no peak memory")
    parser.add_argument("--memory-batch-size", type=int, default=256)
    parser.add_argument(
        "--only", help=f"names with commas between (plain is always among them), or all: {', '.join(CONTENDERS)}"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="write what is printed")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; with ``--json`` and ``--markdown``, write too."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    device = pick_device(options.device)
    both = options.amp is None and device.type == "cuda"
    plan = Plan(
        model=options.model,
        batch_size=options.batch_size,
        rounds=options.rounds,
        amps=(False, True) if both else (bool(options.amp),),
        keep_memory=not options.no_keep_memory,
        memory_batch_size=None if options.no_memory else options.memory_batch_size,
        only=options.only,
        channels_last=options.channels_last,
        cycles=GPU_CYCLES if device.type == "cuda" else 1,
    )
    result = {**measure(plan, device), "command": command(arguments)}
    text = report(result)
    publish(result, text, options.json, options.markdown)


if __name__ == "__main__":
    main()
