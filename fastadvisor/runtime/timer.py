"""Durations of steps, measured without synchronising with the device."""

import statistics
import time
from typing import Any

import torch


class StepTimer:
    """Time between marks: wall clock on the CPU, events on a GPU, where a step returns before it is done.

    Call :meth:`start` before the first step, :meth:`mark` after each, :meth:`collect` at the end of an epoch.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def start(self) -> None:
        """Begin an epoch."""
        self._marks = []
        self.mark()

    def mark(self) -> None:
        """Note that a step has been issued."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def collect(self) -> list[float]:
        """Return the milliseconds of each step of the epoch; on a GPU this waits for the last one."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self._cuda:
            self._marks[-1].synchronize()
            return [before.elapsed_time(after) for before, after in pairs]
        return [1000 * (after - before) for before, after in pairs]


def median(values: list[float]) -> float | None:
    """Return the median of ``values``; None if there are none."""
    return statistics.median(values) if values else None
