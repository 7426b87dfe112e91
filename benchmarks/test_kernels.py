"""``pytest benchmarks``: each kernel's contenders, forward and backward, after a check of values and gradients."""

from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.contenders import Unavailable
from benchmarks.kernels.contenders import OPERATIONS, Function, check
from benchmarks.kernels.timing import runs, synchronize
from fastadvisor.runtime.precision import pick_device

# Figures to quote come from ``python -m benchmarks.kernels``, which takes the contenders in turn and flushes caches.
ON_CPU = [(128, 10), (128, 1000)]
ON_GPU = [*((128, classes) for classes in (10, 100, 365, 1000, 8142, 32_768, 131_072)), (32_768, 1000)]
SIZES = ON_GPU if torch.cuda.is_available() else ON_CPU
ENTRIES = [(operation, name) for operation, entry in OPERATIONS.items() for name in entry.contenders]


@cache
def prepared(operation: str, name: str, batch: int, classes: int) -> tuple[Function | None, str | None]:
    """Build and check one contender; None and the reason where it cannot run here."""
    contender, device = OPERATIONS[operation].contenders[name], pick_device("auto")
    if contender.on_gpu_only and device.type == "cpu":
        return None, "needs a GPU"
    inputs = OPERATIONS[operation].make(batch, classes, torch.float32, device)
    try:
        function = contender.build()
        return function, check(OPERATIONS[operation], contender, function, inputs)
    except Unavailable as reason:
        return None, str(reason)


@pytest.mark.parametrize(("operation", "name"), ENTRIES, ids=[f"{operation}-{name}" for operation, name in ENTRIES])
@pytest.mark.parametrize(("batch", "classes"), SIZES, ids=[f"{batch}x{classes}" for batch, classes in SIZES])
def test_kernel(operation: str, name: str, batch: int, classes: int, benchmark: Any) -> None:
    """Time one contender at one size; fail if its check is red, skip if it cannot run here."""
    function, reason = prepared(operation, name, batch, classes)
    if function is None:
        pytest.skip(f"{name}: {reason}")
    if reason is not None:
        pytest.fail(f"{name}: {reason}")
    device, entry = pick_device("auto"), OPERATIONS[operation]
    run = runs(entry.contenders[name], function, entry.make(batch, classes, torch.float32, device))["both"]

    def timed() -> None:
        run()
        synchronize(device)

    twins = " (the torch twins)" if device.type == "cpu" else ""
    benchmark.group = f"{operation}, {batch} × {classes}, {device.type}{twins}"
    benchmark.pedantic(timed, rounds=20, iterations=5, warmup_rounds=2)
