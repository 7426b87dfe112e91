"""``pytest benchmarks``: images a second of each loader, after its batches have been compared with the torch loader's."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks.loaders import CEILING, LOOP, NAMES, WARM_UP, Setting, fault, pillow_batches
from benchmarks.photos import write_benchmark_set
from fastadvisor.data.loaders import dali
from fastadvisor.runtime.environment import cpu_cores
from fastadvisor.runtime.precision import pick_device

# Figures to quote come from ``python -m benchmarks.loaders``, which takes the loaders in turn.
THREADS = sorted({1, max(1, cpu_cores() // 2), cpu_cores()})
CASES = [(name, workers) for name in NAMES for workers in (THREADS if name not in (CEILING, LOOP) else [1])]
BATCH, BATCHES = 64, 8


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that generates the JPEGs of one size, once."""

    @cache
    def setting(side: int) -> Setting:
        root: Path = tmp_path_factory.mktemp(f"photos{side}")
        return Setting(write_benchmark_set(root, side, 512), pick_device("auto"), BATCH)

    return setting


@pytest.mark.parametrize("side", [256, 500])
@pytest.mark.parametrize(("name", "workers"), CASES, ids=[f"{name}-{workers}" for name, workers in CASES])
def test_loader(name: str, workers: int, side: int, photographs: Any, benchmark: Any) -> None:
    """Time batches of one loader; fail if its check is red, skip if it is not installed."""
    if name == "dali" and not dali.available():
        pytest.skip("NVIDIA DALI is not installed")
    setting: Setting = photographs(side)
    reason = fault(name, setting)
    if reason is not None:
        pytest.fail(f"{name}: {reason}")
    benchmark.group = f"{BATCHES * BATCH} JPEGs of {side} pixels to {setting.device.type}"
    if name == LOOP:
        made = pillow_batches(setting)
        benchmark.pedantic(lambda: [next(made) for _ in range(BATCHES)], rounds=3)
        return
    with setting.opened(name, workers) as loaders:
        for _ in range(WARM_UP):
            loaders.train.next_batch()
        benchmark.pedantic(lambda: [loaders.train.next_batch() for _ in range(BATCHES)], rounds=5)
