"""What the kernels cost beside plain torch, the same compiled, and the cross-entropies of others.

    python -m benchmarks.kernels [--json FILE] [--markdown FILE] [--sizes small|all] [--only mes_cross_entropy,tangent_loss]
    python -m benchmarks.kernels --tune

One process, the contenders in turn, medians. Each is first held against float64 (values and gradients); one that is off is not
timed. On a GPU: wall time of a call, and the time of its kernels alone, between events, captured in a CUDA graph, caches
flushed; bytes that must move over that time, beside a copy. On the CPU the same harness times the torch twins: what runs there.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import Unavailable
from benchmarks.kernels import epilogue, timing
from benchmarks.kernels.contenders import OPERATIONS, Contender, Function, Inputs, Operation, check
from benchmarks.kernels.report import report
from benchmarks.kernels.tune import tune
from benchmarks.tables import about, command
from fastadvisor.runtime.precision import pick_device

CLASSES = (1000, 8142, 131_072, 10, 100, 365, 32_768)
"""The sizes that decide first: time may be short."""
ELEMENTS = 2**25
"""B · C of the large batches on a GPU."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def sizes(kind: str, device: torch.device) -> list[tuple[int, int]]:
    """Return the (B, C) to measure: a batch as in training, and one that memory decides on."""
    if kind == "small" or device.type == "cpu":
        classes = (10, 1000) if kind == "small" else tuple(sorted(CLASSES)[:5])
        return [(128, number) for number in classes]
    return [(batch, number) for number in CLASSES for batch in (128, max(256, ELEMENTS // number))]


def measure(
    operation: Operation, batch: int, classes: int, dtype: torch.dtype, plan: argparse.Namespace
) -> list[dict[str, Any]]:
    """Check and time every contender at one size; a row for each contender and phase, with a reason where there is no time."""
    device: torch.device = plan.torch_device
    inputs = operation.make(batch, classes, dtype, device)
    size = {"operation": operation.name, "batch": batch, "classes": classes, "dtype": str(dtype).removeprefix("torch.")}
    rows: list[dict[str, Any]] = []
    cycles: dict[str, dict[str, timing.Run]] = {phase: {} for phase in timing.PHASES}
    for name, contender in operation.contenders.items():
        try:
            function, reason = prepared(operation, contender, inputs)
            found = {} if function is None else timing.runs(contender, function, inputs)
            if device.type == "cuda" and not contender.waits:
                for run in found.values():
                    timing.captured(run)  # here, where one that cannot be captured is left out by itself
        except Exception as error:  # one library's fault is not to take all figures with it
            found, reason = {}, f"failed and is not timed ({' '.join(f'{type(error).__name__}: {error}'.split())[:200]})"
        if not found:
            rows.append({**size, "contender": name, "left_out": reason})
        for phase, run in found.items():
            cycles[phase][name] = run
    for phase, entries in cycles.items():
        rows += timed(operation, phase, entries, size, dtype, plan)
    return rows


def timed(
    operation: Operation,
    phase: str,
    entries: dict[str, timing.Run],
    size: dict[str, Any],
    dtype: torch.dtype,
    plan: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Time one phase of the contenders in turn."""
    device, elements = plan.torch_device, size["batch"] * size["classes"]
    repeats = plan.repeats or (20 if elements <= 2**20 and device.type == "cuda" else 3)
    wall = timing.wall(entries, plan.rounds, repeats, device)
    waiting = [name for name in entries if operation.contenders[name].waits]
    alone = timing.on_device(entries, plan.rounds, plan.flush, waiting) if device.type == "cuda" else {}
    rows = []
    for name, micros in wall.items():
        moved = operation.bytes(phase, elements, dtype.itemsize, contender=operation.contenders[name])
        row: dict[str, Any] = {**size, "contender": name, "phase": phase, "wall_us": micros, "kernel_us": alone.get(name)}
        row |= {"bytes": moved, "bytes_per_second": moved / (1e-6 * (row["kernel_us"] or micros))}
        rows.append({**row, "share_of_copy": row["bytes_per_second"] / plan.copy_bandwidth})
    return rows


def measure_all(plan: argparse.Namespace, result: dict[str, Any]) -> None:
    """Measure every operation at every size into ``result``, written after each: a run that is cut off leaves something."""
    begun = time.perf_counter()
    result["rows"], result["not_begun"] = [], []
    for batch, classes in sizes(plan.sizes, plan.torch_device):  # outermost: all operations have some sizes if time is short
        for operation in plan.operations:
            for name in plan.dtypes.split(","):
                if time.perf_counter() - begun > plan.seconds:
                    result["not_begun"].append(f"{operation.name}, {name}, {batch} × {classes}")
                    continue
                result["rows"] += measure(operation, batch, classes, DTYPES[name], plan)
        write(plan, result)


def write(plan: argparse.Namespace, result: dict[str, Any]) -> str:
    """Write what there is, and return it as Markdown."""
    text = report(result)
    if plan.markdown:
        plan.markdown.write_text(text + "\n")
    if plan.json:
        plan.json.write_text(json.dumps(result, indent=1) + "\n")
    return text


def prepared(operation: Operation, contender: Contender, inputs: Inputs) -> tuple[Function | None, str | None]:
    """Return the contender's function, checked; or None and the reason."""
    if contender.on_gpu_only and not inputs[0].is_cuda:
        return None, "needs a GPU"
    torch._dynamo.reset()  # every size compiled for itself
    try:
        function = contender.build()
        fault = check(operation, contender, function, inputs)
    except Unavailable as reason:
        return None, str(reason)
    return (function, None) if fault is None else (None, fault)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="with commas between")
    parser.add_argument("--only", help=f"operations with commas between: {', '.join(OPERATIONS)}")
    parser.add_argument("--sizes", default="all", choices=["small", "all"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, help="calls back to back; default by size")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further size after so long, and say so")
    parser.add_argument("--tune", action="store_true", help="time the neighbours of each tile of the table instead (a GPU)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="write what is printed")
    options = parser.parse_args(arguments)
    names = list(OPERATIONS) if options.only is None else [name.strip() for name in options.only.split(",")]
    unknown = [name for name in names if name not in OPERATIONS] + [d for d in options.dtypes.split(",") if d not in DTYPES]
    if unknown:
        raise SystemExit(
            f"--only, --dtypes: unknown {', '.join(unknown)}; operations {', '.join(OPERATIONS)}; {', '.join(DTYPES)}."
        )
    options.operations = [OPERATIONS[name] for name in names]
    options.torch_device = pick_device(options.device)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; with ``--json`` and ``--markdown``, write too."""
    arguments = sys.argv[1:] if arguments is None else arguments
    plan = parse(arguments)
    device: torch.device = plan.torch_device
    result: dict[str, Any] = {
        "command": command(arguments, "benchmarks.kernels"),
        "device": device.type,
        "rounds": plan.rounds,
        "environment": about(),
    }
    with timing.side_stream(device):
        if plan.tune:
            result["tiles"] = tune(device, plan.rounds, plan.seconds)
            result["epilogue"] = epilogue.measure(device, plan.rounds, timing.Flush(device))
        else:
            plan.flush = timing.Flush(device) if device.type == "cuda" else None
            plan.copy_bandwidth = timing.copy_bandwidth(device, 1024 if device.type == "cuda" else 128)
            result["copy_bandwidth"] = plan.copy_bandwidth
            measure_all(plan, result)
    print(write(plan, result))
    if any("is not timed" in (row.get("left_out") or "") for row in result.get("rows", [])):
        raise SystemExit("A check is red, or a contender failed: see the reasons above.")


if __name__ == "__main__":
    main()
