import time

import pytest
import torch

from fastadvisor.runtime.timer import StepTimer, median

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Seconds, advanced by hand."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


def test_milliseconds_of_each_step(clock):
    timer = StepTimer(CPU)
    timer.start()
    for seconds in (0.25, 1.5, 0.125):
        clock(seconds)
        timer.mark()
    assert timer.collect() == pytest.approx([250, 1500, 125])
    assert timer.collect() == pytest.approx([250, 1500, 125])


def test_start_forgets_the_epoch_before(clock):
    timer = StepTimer(CPU)
    timer.start()
    clock(1)
    timer.mark()
    clock(60)  # between epochs
    timer.start()
    assert timer.collect() == []
    clock(2)
    timer.mark()
    assert timer.collect() == pytest.approx([2000])


def test_before_the_first_start():
    assert StepTimer(CPU).collect() == []


def test_the_real_clock():
    timer = StepTimer(CPU)
    timer.start()
    time.sleep(0.02)
    timer.mark()
    (step,) = timer.collect()
    assert 19 < step < 5000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_events_on_a_gpu():
    timer, x = StepTimer(torch.device("cuda")), torch.randn(1024, 1024, device="cuda")
    timer.start()
    for _ in range(3):
        x = x @ x / 32
        timer.mark()
    steps = timer.collect()
    assert len(steps) == 3
    assert min(steps) > 0


@pytest.mark.parametrize(("values", "want"), [([3.0], 3), ([9.0, 1.0, 2.0], 2), ([4.0, 1.0, 2.0, 100.0], 3), ([], None)])
def test_median(values, want):
    assert median(values) == want
