"""``pytest benchmarks``: images a second of each loader, after its batches have been compared with the torch loader's."""

import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kernels.timing import synchronize
from benchmarks.loaders import CEILING, LOOP, NAMES, WARM_UP, Setting, fault, pillow_batches, trained
from benchmarks.photos import write_benchmark_set
from fastadvisor.loading.backends import dali
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
        _tell(benchmark, BATCHES * BATCH)
        return
    with setting.opened(name, workers) as loaders:
        for _ in range(WARM_UP):
            loaders.train.next_batch()
        benchmark.pedantic(lambda: [loaders.train.next_batch() for _ in range(BATCHES)], rounds=5)
    _tell(benchmark, BATCHES * BATCH)


@pytest.mark.parametrize("name", [name for name in NAMES if name != LOOP])
def test_training(name: str, photographs: Any, benchmark: Any) -> None:
    """Time training steps on 500-pixel JPEGs by one loader; the share of time spent waiting is in the report's extra_info."""
    if name == "dali" and not dali.available():
        pytest.skip("NVIDIA DALI is not installed")
    setting: Setting = photographs(500)
    reason = fault(name, setting)
    if reason is not None:
        pytest.fail(f"{name}: {reason}")
    model, batch = ("resnet50", 64) if setting.device.type == "cuda" else ("resnet18", 16)
    benchmark.group = f"a step of {model}, batch {batch}, 500-pixel JPEGs, {setting.device.type}"
    with trained(name, setting, cpu_cores(), model, batch) as trainer:
        began, waited = time.perf_counter(), trainer.train_loader.waited

        def step() -> None:
            trainer.step(trainer.train_loader.next_batch(), None)
            synchronize(setting.device)

        benchmark.pedantic(step, rounds=8)
        seconds = time.perf_counter() - began
        benchmark.extra_info["waiting_share"] = round((trainer.train_loader.waited - waited) / seconds, 4)
    _tell(benchmark, batch)


def _tell(benchmark: Any, images: int) -> None:
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info["images_per_second"] = round(images / benchmark.stats.stats.median)
