"""``pytest benchmarks``: the step of each contender, after a check of its meta-gradient."""

from functools import cache
from typing import Any

import pytest

from benchmarks.checks import Checked, correctness
from benchmarks.contenders import CONTENDERS, CORE, Setting
from benchmarks.step import Plan, make_cycle, synchronize
from fastadvisor.runtime.allocator import keep_freed_memory
from fastadvisor.runtime.precision import pick_device

# Few rounds: all of it should take two CPU cores under four minutes. Figures to quote come from ``python -m benchmarks.step``.
WORKLOADS = [("resnet32", 128, 3), ("resnet18-cifar", 64, 2)]


@pytest.fixture(autouse=True, scope="module")
def as_in_training() -> None:
    """Keep freed memory, as a training run does: without it the order of the contenders decides what glibc keeps."""
    if pick_device("auto").type == "cpu":
        keep_freed_memory()


@cache
def checked(model: str) -> Checked:
    """Run the correctness check once a model; on 4 images, as a ResNet-18 in float64 takes a minute for 16."""
    return correctness(CORE, model, pick_device("auto"), batch=4)


@pytest.mark.parametrize("name", CORE)
@pytest.mark.parametrize(("model", "batch_size", "rounds"), WORKLOADS, ids=[model for model, _, _ in WORKLOADS])
def test_step(name: str, model: str, batch_size: int, rounds: int, benchmark: Any) -> None:
    """Time one contender; fail if its check is red, skip if it cannot run here."""
    check, contender = checked(model), CONTENDERS[name]
    if name in check.red:
        pytest.fail(f"{name}: {check.left_out[name]}")
    if name in check.left_out:
        pytest.skip(f"{name}: {check.left_out[name]}")
    device = pick_device("auto")
    cycle = make_cycle(name, Setting(model, device), Plan(batch_size=batch_size))

    def run() -> None:
        cycle.run()
        synchronize(device)

    benchmark.group = f"{model}, batch {batch_size}, {device.type}"
    benchmark.extra_info.update(
        error=check.errors.get(name),
        cosine=check.cosines.get(name),
        iterations_per_cycle=contender.iterations_per_cycle,
    )
    # A round is a whole cycle; what is reported is an iteration's share of it.
    benchmark.pedantic(run, rounds=rounds, iterations=cycle.iterations, warmup_rounds=1)
