"""``pytest benchmarks``: the step of each contender, after a check that the exact engine is exact."""

from typing import Any

import pytest

from benchmarks.step import CONTENDERS, LIMIT, batches, correctness, make_step
from fastadvisor.runtime.precision import pick_device

MODEL, BATCH = "resnet32", 128


@pytest.fixture(scope="module")
def checked() -> dict[str, float]:
    """Run the correctness check once."""
    return correctness(MODEL, pick_device("auto"))


@pytest.mark.parametrize("name", CONTENDERS)
def test_step(name: str, benchmark: Any, checked: dict[str, float]) -> None:
    """Time one contender; refuse if the check is red."""
    assert checked["exact_error"] <= LIMIT, "the exact engine is off: nothing is timed"
    device = pick_device("auto")
    step, (train, meta) = make_step(name, MODEL, device, amp=False), batches(BATCH, device)
    benchmark.extra_info.update(checked, model=MODEL, batch=BATCH, device=str(device))
    # Reading the loss waits for a GPU to finish.
    benchmark.pedantic(lambda: float(step(train, meta).loss), rounds=5, warmup_rounds=1)
