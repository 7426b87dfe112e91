"""Times the neighbours of each tile in the table of ``equalization_softmax/plan.py``, to see whether the table is right."""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.kernels import timing
from benchmarks.kernels.contenders import make_loss, make_tangent
from fastadvisor_kernels.equalization_softmax.flat import FlatBeta, Options
from fastadvisor_kernels.equalization_softmax.plan import plan_gradients, plan_loss
from fastadvisor_kernels.launch import Launch, ceil_div
from fastadvisor_kernels.tangent_loss.plan import Inputs, plan_tangent

CLASSES = (10, 100, 365, 1000, 2048, 4096, 32_768)
MOST_ELEMENTS = 64
"""A thread: beyond it registers spill."""


def neighbours(launch: Launch, rows: int) -> Iterator[Launch]:
    """Yield the launch with half and twice the rows and warps, itself first."""
    yield launch
    own = launch.arguments["ROWS"]
    for height in sorted({max(1, own // 4), max(1, own // 2), own, own * 2, own * 4}):
        for warps in (1, 2, 4, 8):
            elements = height * launch.arguments["BLOCK"] / (32 * warps)
            if (height, warps) != (own, launch.warps) and 2 <= elements <= MOST_ELEMENTS:
                grid = (ceil_div(rows, height), *launch.grid[1:])
                yield launch._replace(grid=grid, arguments=launch.arguments | {"ROWS": height}, warps=warps)


def launches(batch: int, classes: int, dtype: torch.dtype, device: torch.device) -> dict[str, Launch]:
    """Return the kernels whose tiles come from the table, ready to run."""
    z, v, y = make_loss(batch, classes, dtype, device)
    flat, options = FlatBeta.of(None), Options()
    plan = plan_loss(z, v, y, flat, options)
    assert plan.lse is not None
    (gradients,), *_ = plan_gradients(plan.loss, z, v, y, plan.lse, None, flat, options, of_z=True, of_v=True)
    z, z_dot, v, y = make_tangent(batch, classes, dtype, device)
    tangent = plan_tangent(Inputs(z, z_dot, v, None), y, flat, options)
    return {"loss": plan.launches[0], "gradients": gradients, "tangent": tangent.launches[0]}


def tune(device: torch.device, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Return the time of each tile of the table and of the best of its neighbours; begins no size after ``seconds``.

    Raises:
        SystemExit: there is no GPU.
    """
    if device.type != "cuda":
        raise SystemExit("--tune times Triton's kernels, which need a GPU; there is none here.")
    begun, flush = time.perf_counter(), timing.Flush(device)
    found: list[dict[str, Any]] = []
    for classes in CLASSES:
        for batch in (128, max(256, 2**25 // classes)):
            for dtype in (torch.bfloat16, torch.float32):
                for kernel, launch in launches(batch, classes, dtype, device).items():
                    if time.perf_counter() - begun > seconds:
                        return found
                    entries = list(neighbours(launch, batch))
                    names = [f"{entry.arguments['ROWS']} rows, {entry.warps} warps" for entry in entries]
                    runs = {name: partial(Launch.run, entry) for name, entry in zip(names, entries, strict=True)}
                    times = timing.on_device(runs, rounds, flush)
                    best = min(times, key=times.__getitem__)
                    size = {"kernel": kernel, "dtype": str(dtype).removeprefix("torch."), "batch": batch, "classes": classes}
                    result = {"own": names[0], "own_us": times[names[0]], "best": best, "best_us": times[best]}
                    found.append({**size, **result, "times": times})
    return found
