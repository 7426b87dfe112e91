"""When a run saves and when it stops: by signals and by the clock, and agreed on by all ranks."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from fastadvisor.runtime.ranks import ALONE, Ranks

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
GRACE = 20.0
"""Seconds in which an iteration, a batch of a test or a save ends: torchrun waits for 30 before it kills."""


class Action(IntEnum):
    """What to do after an iteration; if the ranks differ, the largest value counts."""

    NOTHING = 0
    SAVE = 1
    STOP = 2
    """Save, and end."""


class Interruption:
    """Records whether the process has been asked to stop.

    Inside :meth:`watched`, SIGINT, SIGTERM and SIGHUP (the terminal has gone) are noted and nothing else; a second SIGINT ends
    the process at once. One that was ignored from the start stays so, as SIGHUP under nohup.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.steps = 0
        """Iterations so far, and whatever else shows that the process is not stuck."""

    @contextmanager
    def watched(self, ranks: Ranks = ALONE) -> Iterator["Interruption"]:
        """Note signals that arrive inside the block. Off the main thread Python allows no handlers: nothing is noted then.

        torchrun ends all ranks by SIGTERM when one has failed. A rank that waits for the failed one inside a library never gets
        to Python's handler; where nothing moves for ``GRACE`` seconds after the signal, a thread ends the process.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        heard = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._note) for number in heard}
        ear, mouth = socket.socketpair()
        mouth.setblocking(False)
        woken = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False) if ranks.count > 1 else None
        if woken is not None:
            threading.Thread(target=self._end_if_stuck, args=(ear,), daemon=True).start()
        try:
            yield self
        finally:
            if woken is not None:
                signal.set_wakeup_fd(woken)
            for number, handler in before.items():
                signal.signal(number, handler)
            mouth.close()  # ends the thread

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def _end_if_stuck(self, ear: socket.socket) -> None:
        while number := ear.recv(1):
            if number[0] == signal.SIGINT:
                continue
            ear.settimeout(GRACE)
            steps = -1
            while steps != self.steps:
                steps = self.steps
                try:
                    if not ear.recv(1):
                        return
                except TimeoutError:
                    continue
            os._exit(128 + signal.SIGTERM)


class SaveClock:
    """Decides after each iteration whether to save and whether to stop.

    Args:
        interruption: of this process.
        minutes: from one save to the next; 0: only at the end of an epoch.
        every: iterations from one save to the next; 0: no such rule.
        ranks: who must agree. Their votes travel while the next iteration is under way, so they act one iteration later.
    """

    def __init__(self, interruption: Interruption, minutes: float, every: int, ranks: Ranks) -> None:
        self.interruption, self.minutes, self.every, self.ranks = interruption, minutes, every, ranks
        self._last = time.monotonic()
        self._vote: tuple[torch.Tensor, Any] | None = None

    def saved(self) -> None:
        """Restart the clock, after a save."""
        self._last = time.monotonic()

    def decide(self, iteration: int) -> Action:
        """Return what all ranks are to do after ``iteration``, counted from 1."""
        self.interruption.steps += 1
        mine = Action.NOTHING
        if self.interruption.signal is not None:
            mine = Action.STOP
        elif self.ranks.first and self._due(iteration):
            mine = Action.SAVE
        if self.ranks.count == 1:
            return mine
        agreed = self.settle()
        vote = torch.tensor(int(mine))
        self._vote = vote, dist.all_reduce(vote, dist.ReduceOp.MAX, async_op=True)
        return agreed

    def settle(self) -> Action:
        """Wait for the vote under way, if any, and return its result."""
        if self._vote is None:
            return Action.NOTHING
        (vote, work), self._vote = self._vote, None
        work.wait()
        return Action(int(vote))

    def _due(self, iteration: int) -> bool:
        by_clock = self.minutes > 0 and time.monotonic() - self._last >= 60 * self.minutes
        return by_clock or (self.every > 0 and iteration % self.every == 0)
