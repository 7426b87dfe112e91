"""The learning rate over a run, and the run's division into stages."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastadvisor.config import Config, OptimizerConfig
from fastadvisor.errors import UserError
from fastadvisor.methods import Clock, Stage


def learning_rate(config: OptimizerConfig, step: int, total: int, warmup: int = 0) -> float:
    """Return the rate of 0-based ``step`` out of ``total``.

    step: ``lr``, times ``lr_decay`` at each milestone; cosine: from ``lr`` to 0, by the step; constant: ``lr``. In the first
    ``warmup`` steps the rate rises in equal steps from 1/warmup of that.
    """
    factor = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if config.schedule == "cosine":
        return factor * config.lr * 0.5 * (1 + math.cos(math.pi * step / total))
    if config.schedule == "step":
        # Rounded, so that 0.8 of 200 epochs falls on the first step of epoch 160 and not one beside it.
        passed = sum(step >= round(milestone * total) for milestone in config.milestones)
        return factor * config.lr * config.lr_decay**passed
    return factor * config.lr


@dataclass
class StageEpochs:
    """A stage in epochs: [start, end)."""

    stage: Stage
    start: int
    end: int


def at(stages: list[StageEpochs], epoch: int) -> StageEpochs:
    """Return the stage that ``epoch`` is in."""
    return next(part for part in stages if part.start <= epoch < part.end)


def divide(stages: Sequence[Stage], epochs: int) -> list[StageEpochs]:
    """Give each stage its share of ``epochs``, in order, rounded to whole epochs.

    A stage with any share gets one epoch at least, as long as there are epochs for all of them.
    """
    divided, start, share = [], 0, 0.0
    left = sum(stage.fraction > 0 for stage in stages)
    least = 1 if epochs >= left else 0
    for stage in stages:
        share += stage.fraction
        wanted = stage.fraction > 0
        left -= wanted
        end = min(max(round(share * epochs), start + least * wanted), epochs - least * left)
        divided.append(StageEpochs(stage, start, end))
        start = end
    return divided


class Timetable:
    """Which stage each epoch of a run is in, and the learning rate of each of its steps.

    Args:
        config: the schedule's settings.
        stages: of the method.
        epochs: of the whole run.
        steps: iterations an epoch.
    """

    def __init__(self, config: Config, stages: Sequence[Stage], epochs: int, steps: int) -> None:
        self.config, self.epochs, self.steps = config, epochs, steps
        self._of_method = tuple(stages)
        self.stages = divide(stages, epochs)

    def at(self, epoch: int) -> StageEpochs:
        """Return the stage that ``epoch``, counted from 0, is in."""
        return at(self.stages, epoch)

    def clock(self, epoch: int) -> Clock:
        """Return what the method is told at the start of ``epoch``."""
        current = self.at(epoch)
        number, within = self.stages.index(current), epoch - current.start
        return Clock(epoch, self.epochs, number, within, current.end - current.start)

    def rate(self, current: StageEpochs, epoch: int, index: int) -> float:
        """Return the learning rate of the ``index``-th step of ``epoch``, which is in the stage ``current``."""
        step, total = (epoch - current.start) * self.steps + index, (current.end - current.start) * self.steps
        warmup = round(self.config.warmup_epochs * self.steps)
        return current.stage.lr_factor * learning_rate(self.config, step, total, warmup)

    def check_continues(self, before: int, done: int, path: Path) -> None:
        """Find out whether a run that was begun with another length may go on with this one: whether all of its steps so far
        would have been the same.

        Args:
            before: epochs that it was begun with.
            done: steps that it has taken.
            path: of the checkpoint that it goes on from.

        Raises:
            UserError: they would not have been; names the way out.
        """
        if self.epochs == before:
            return
        if self.epochs * self.steps < done:
            raise UserError(
                f"The run has trained {done / self.steps:.3g} epochs, and --epochs {self.epochs} is less: name more."
            )
        earlier = Timetable(self.config, self._of_method, before, self.steps)
        for epoch, index in (divmod(step, self.steps) for step in range(done)):
            old, new = earlier.at(epoch), self.at(epoch)
            if old.stage != new.stage or earlier.rate(old, epoch, index) != self.rate(new, epoch, index):
                raise UserError(
                    f"--epochs {self.epochs} in place of {before} would have trained epoch {epoch + 1} at another rate, or on "
                    f"other images (--schedule {self.config.schedule}, --method {self.config.method}): go on with --epochs "
                    f"{before}, or begin a new run with these weights, as with --weights {shlex.quote(str(path))} --output NEW."
                )
