"""``--dry-run``: a few iterations without writing anything; and a search for the batch size that fits after memory ran out."""

import gc
import logging
import time
from contextlib import closing
from dataclasses import dataclass, replace

import torch

from fastadvisor.config import Config
from fastadvisor.datasets import TrainingData
from fastadvisor.errors import OutOfMemoryError, UserError
from fastadvisor.runtime import memory
from fastadvisor.runtime.cuda_graph import WARM_UP
from fastadvisor.runtime.run_folder import check_writable
from fastadvisor.runtime.timer import median
from fastadvisor.runtime.watch import NonFiniteError
from fastadvisor.training import messages
from fastadvisor.training.trainer import Trainer

logger = logging.getLogger(__name__)

ITERATIONS = 10


@dataclass
class DryRun:
    """Results of a dry run: how long the run would take, and how much memory."""

    step_ms: float
    """Mean of an iteration."""
    step_ms_median: float
    images_per_second: float
    test_seconds: float
    """Of one test."""
    peak_memory_mb: float | None
    """On a GPU, and where the system tells."""
    iterations: int
    epochs: int
    hours: float
    """That the whole run would take."""

    def sentence(self) -> str:
        """Return the results as a sentence."""
        peak = "" if self.peak_memory_mb is None else f", {self.peak_memory_mb:,.0f} MiB at the peak"
        return (
            f"Dry run: {self.step_ms:.1f} ms an iteration (mean of {ITERATIONS}, median {self.step_ms_median:.1f}), "
            f"{self.images_per_second:,.0f} images/s, {self.test_seconds:.1f} s a test{peak}; {self.iterations:,} iterations "
            f"in {self.epochs} epochs would take about {self.hours:.2g} hours. Nothing was written."
        )


def rehearse(trainer: Trainer) -> DryRun:
    """Take ten iterations (after some that warm up) and test once; the model is not to be used afterwards.

    Raises:
        UserError: as a run would, so far, or the output folder could not be written.
    """
    config = trainer.config
    check_writable(config.output)
    logger.info(messages.headline(config, trainer.data, trainer.device, "none (a dry run)", trainer.ranks.count))
    logger.info(f"Images of {trainer.loaders.size} pixels by the {trainer.loaders.name} loader ({trainer.loaders.why}).")
    memory.reset_peak(trainer.device)
    warm = trainer.step.interval * (1 if trainer.take is None else WARM_UP + 1)
    times = time_iterations(trainer, ITERATIONS + warm)[warm:]
    began = time.perf_counter()
    trainer.test(trainer.loaders.test)
    testing = time.perf_counter() - began
    step, steps = sum(times) / len(times), config.epochs * len(trainer.train_loader)
    found = DryRun(
        step_ms=1000 * step,
        step_ms_median=1000 * (median(times) or 0),
        images_per_second=config.batch_size / step,
        test_seconds=testing,
        peak_memory_mb=memory.peak_mb(trainer.device),
        iterations=steps,
        epochs=config.epochs,
        hours=(steps * step + config.epochs * testing) / 3600,
    )
    logger.info(found.sentence())
    return found


def time_iterations(trainer: Trainer, count: int) -> list[float]:
    """Take ``count`` training steps and return the seconds of each, waiting for the device.

    Raises:
        UserError: something in one of them is not finite.
    """
    times = []
    stage = trainer.stages[0]
    trainer.model.train()
    for index in range(count):
        began = time.perf_counter()
        trainer.set_lr(stage, index)
        try:
            trainer.iterate(*trainer.batches(stage))
            if trainer.step.watch is not None:
                trainer.step.watch.settle()
        except NonFiniteError as error:
            raise UserError(
                f"Iteration {trainer.step.iteration} of the dry run: {error.name} is not finite; lower --lr or --advisor-lr."
            ) from None
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        times.append(time.perf_counter() - began)
    return times


def find_fitting_batch_size(config: Config, data: TrainingData, device: torch.device, ranks: int = 1) -> int | None:
    """Halve --batch-size until an iteration with a meta step goes through; None if none does, or the trouble is another.

    Of several ranks the one whose memory ran out tries its own part alone: the others wait for it in vain.
    """
    batch = config.batch_size // ranks // 2
    while batch >= max(2, config.accumulate):
        batch -= batch % config.accumulate
        meta = None if config.meta_batch_size is None else min(config.meta_batch_size // ranks, batch)
        smaller = replace(config, batch_size=batch, meta_batch_size=meta)
        try:
            with memory.explain_out_of_memory(device), closing(Trainer(smaller, data, device)) as trainer:
                time_iterations(trainer, trainer.step.interval)
            return batch * ranks
        except OutOfMemoryError as error:
            error.__context__ = None  # whose frames hold the tensors
        except UserError:
            return None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        batch //= 2
    return None
