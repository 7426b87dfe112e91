"""A run tried out without leaving anything: ``--dry-run``, and the batch size that fits when memory ran out."""

import gc
import time
from contextlib import closing
from dataclasses import replace

import torch

from fastadvisor import reporting
from fastadvisor.config import Config
from fastadvisor.data import TrainingData
from fastadvisor.errors import OutOfMemoryError, UserError
from fastadvisor.runtime import memory
from fastadvisor.runtime.run_folder import check_writable
from fastadvisor.runtime.timer import median
from fastadvisor.trainer import Trainer

ITERATIONS = 10


def report(trainer: Trainer) -> None:
    """Take ten iterations (after a first, which warms up) and test once, and print how long the run would take and what of
    memory; the model is not to be used afterwards.

    Raises:
        UserError: as a run would, so far, or the output folder could not be written.
    """
    config = trainer.config
    check_writable(config.output)
    print(reporting.headline(config, trainer.data, trainer.device, "none (a dry run)", trainer.ranks.count))
    print(f"Images of {trainer.loaders.size} pixels by the {trainer.loaders.name} loader ({trainer.loaders.why}).")
    memory.reset_peak(trainer.device)
    interval = trainer.step.interval
    times = iterate(trainer, ITERATIONS + interval)[interval:]
    began = time.perf_counter()
    trainer.test()
    testing = time.perf_counter() - began
    step = sum(times) / len(times)
    steps = config.epochs * len(trainer.train_loader)
    hours = (steps * step + config.epochs * testing) / 3600
    peak = memory.peak_mb(trainer.device)
    print(
        f"Dry run: {1000 * step:.1f} ms an iteration (mean of {len(times)}, median {1000 * (median(times) or 0):.1f}), "
        f"{config.batch_size / step:,.0f} images/s, {testing:.1f} s a test"
        + ("" if peak is None else f", {peak:,.0f} MiB at the peak")
        + f"; {steps:,} iterations in {config.epochs} epochs would take about {hours:.2g} hours. Nothing was written."
    )


def iterate(trainer: Trainer, count: int) -> list[float]:
    """Take ``count`` training steps and return the seconds of each, waiting for the device."""
    times = []
    phase = trainer.phases[0]
    trainer.model.train()
    for index in range(count):
        began = time.perf_counter()
        trainer.set_lr(phase, index)
        trainer.step(*trainer.batches(phase))
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        times.append(time.perf_counter() - began)
    return times


def batch_size_that_fits(config: Config, data: TrainingData, device: torch.device, ranks: int = 1) -> int | None:
    """Halve --batch-size until an iteration with a meta step goes through; None if none does, or the trouble is another.

    Of several ranks the one whose memory ran out tries its own part alone: the others wait for it in vain.
    """
    batch = config.batch_size // ranks // 2
    while batch >= max(2, config.accumulate):
        batch -= batch % config.accumulate
        meta = None if config.meta_batch_size is None else min(config.meta_batch_size // ranks, batch)
        smaller = replace(config, batch_size=batch, meta_batch_size=meta)
        try:
            with memory.enough(device), closing(Trainer(smaller, data, device)) as trainer:
                iterate(trainer, trainer.step.interval)
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
