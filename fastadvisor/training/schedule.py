"""The learning rate over a run, and the run's division into stages."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastadvisor.config import OptimizerConfig
from fastadvisor.methods import Stage


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
    left = sum(stage.share > 0 for stage in stages)
    least = 1 if epochs >= left else 0
    for stage in stages:
        share += stage.share
        wanted = stage.share > 0
        left -= wanted
        end = min(max(round(share * epochs), start + least * wanted), epochs - least * left)
        divided.append(StageEpochs(stage, start, end))
        start = end
    return divided
