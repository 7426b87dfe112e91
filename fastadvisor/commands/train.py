"""``fastadvisor train``: from a configuration to a run, with its device, ranks, data and folder."""

import contextlib
import logging
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import torch

from fastadvisor.commands import dry_run
from fastadvisor.commands.dry_run import DryRun
from fastadvisor.config import Config, build_config, select_settings
from fastadvisor.datasets import Source, TrainingData, load_source, prepare
from fastadvisor.datasets.fingerprint import fingerprint
from fastadvisor.errors import Interrupted, OutOfMemoryError, UserError
from fastadvisor.loading import cache_images
from fastadvisor.metagrad import check_meta
from fastadvisor.methods import METHODS, check_method
from fastadvisor.models import check_model
from fastadvisor.runtime import allocator, checkpoint, console, memory
from fastadvisor.runtime.precision import check_kernels, pick_device, tune_convolutions
from fastadvisor.runtime.provenance import provenance
from fastadvisor.runtime.ranks import Ranks
from fastadvisor.runtime.run_folder import RunFolder
from fastadvisor.training.optimizers import check_optimizer
from fastadvisor.training.trainer import Trainer, TrainResult

logger = logging.getLogger(__name__)

Settings = str | os.PathLike[str] | Config
"""A recipe's name, a YAML file, or all settings."""


@overload
def train(config: Settings | None = None, /, *, dry_run: Literal[True], **settings: Any) -> DryRun: ...


@overload
def train(config: Settings | None = None, /, *, dry_run: Literal[False] = False, **settings: Any) -> TrainResult: ...


def train(config: Settings | None = None, /, **settings: Any) -> TrainResult | DryRun:
    """Train a classifier; every setting of :class:`fastadvisor.Config` is a keyword.

    Args:
        config: a recipe's name, a YAML file, or a :class:`fastadvisor.Config`; the keywords win over it.
        **settings: as ``method="mfrw-mes", noise="flip", noise_rate=0.4``; ``progress=False`` prints nothing.

    Returns:
        What the run leaves; with ``dry_run=True`` what it would take.

    Raises:
        UserError: anything the caller can put right, before any work is lost.
    """
    return train_config(build_config(Config, config, settings))


def train_config(config: Config, source: Source | None = None) -> TrainResult | DryRun:
    """Train with the settings ``config``; ``source`` is the data set if it has been read already."""
    check_config(config)
    ranks = Ranks.from_environment()
    with only_deterministic(config.deterministic), silence_other_ranks(ranks), console.show_log(config.progress):
        device = pick_device(config.device)
        check_kernels(device)
        if config.keep_memory and device.type == "cpu":
            allocator.keep_freed_memory()
        try:
            with tune_convolutions(device, deterministic=config.deterministic):
                result = _train(resume_after_restart(config, ranks), source, device, ranks)
        except Interrupted:  # all of them
            ranks.leave()
            raise
    ranks.leave()
    return result


def check_config(config: Config) -> None:
    """Check the settings alone, before any data is read.

    Raises:
        UserError: they contradict each other, or name something that does not exist.
    """
    check_method(config.method)
    check_model(config.model)
    check_optimizer(config)
    check_meta(config, METHODS[config.method], amp=config.amp)
    checkpoint.check_weights_file(config.weights)
    if config.virtual_step == "optimizer" and config.optimizer != "sgd":
        raise UserError(
            f"--virtual-step optimizer knows sgd alone: take --virtual-step sgd with --optimizer {config.optimizer}."
        )
    if config.accumulate > 1:
        method = METHODS[config.method]
        flags = (
            method.needs_whole_batch(select_settings(method.Settings, config)),
            "--advisor-inputs attached" if config.advisor_inputs == "attached" else None,
            "--approx-layers learned" if config.approx_meta and config.approx_layers == "learned" else None,
            "--meta-engine reference" if config.meta_engine == "reference" else None,
        )
        for flag in filter(None, flags):
            raise UserError(f"{flag} needs the batch as a whole: drop it or --accumulate {config.accumulate}.")


def _train(config: Config, source: Source | None, device: torch.device, ranks: Ranks) -> TrainResult | DryRun:
    resumes = config.resume
    if resumes == "auto":  # decided by one rank, which soon makes the folder
        resumes = ranks.broadcast(RunFolder.holds_run(config.output) if ranks.first else None)
    begun = RunFolder.open_for_resume(config.output, config) if resumes else None
    if begun is None and ranks.first:
        RunFolder.check_free(config.output)
    if ranks.count > 1 and config.meta_engine == "reference":
        raise UserError("--meta-engine reference is for one process: drop it, or start without torchrun.")
    data: TrainingData | None = None
    try:
        with memory.explain_out_of_memory(device):
            with ranks.let_first_go_ahead():  # who downloads, and makes small copies
                given = load_source(config) if source is None else source
                staged = cache_images(given, config, device)
            data = prepare(staged, config, config.seed)
            for line in data.notes if source is None else data.notes[len(given.notes) :]:
                logger.warning(line)
            with closing(Trainer(config, data, device, ranks)) as trainer:
                if config.dry_run:
                    return dry_run.rehearse(trainer)
                return _run(trainer, begun)
    except OutOfMemoryError as error:
        message = str(error)
        error.__context__ = None  # whose frames hold the tensors
    # Outside the except block: what was held when memory ran out is free now.
    fits = None if data is None else dry_run.find_fitting_batch_size(config, data, device, ranks.count)
    raise OutOfMemoryError(message if fits is None else f"{message} --batch-size {fits} fits (it was tried).")


def _run(trainer: Trainer, begun: RunFolder | None) -> TrainResult:
    config, ranks = trainer.config, trainer.ranks
    if begun is None:
        default = f"{config.dataset}-{config.method}"
        folder = RunFolder.create(config.output, config, default) if ranks.first else None
        begun = RunFolder(Path(ranks.broadcast(None if folder is None else str(folder.path))))
    elif begun.last.is_file():  # else the run was cut off before its first save
        trainer.restore(begun.last)
        trainer.timetable.check_continues(begun.length(), trainer.steps_taken, begun.last)
    if ranks.first:
        begun.clear_temporary()
        begun.truncate_metrics(trainer.epoch)
        begun.write_config(config)
        begun.begin_part(
            {**provenance(ranks.count), "seed": config.seed, "iteration": trainer.step.iteration},
            fingerprint(trainer.data),
            trainer.data.classes,
        )
    return trainer.run(begun)


def resume_after_restart(config: Config, ranks: Ranks) -> Config:
    """Return ``config``, continuing the run if torchrun has started the processes again after a failure (--max-restarts)."""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and config.output is None and ranks.count > 1:
        raise UserError("torchrun --max-restarts needs to find the run again: name its folder with --output.")
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if again and config.output is not None and RunFolder(Path(config.output)).config.is_file():
        return replace(config, resume=True)
    return config


@contextlib.contextmanager
def silence_other_ranks(ranks: Ranks) -> Iterator[None]:
    """Discard the standard output of all ranks but the first, since they would all print the same."""
    if ranks.first:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


@contextlib.contextmanager
def only_deterministic(enabled: bool) -> Iterator[None]:
    """Allow, inside the block, only operations that give the same numbers every time.

    Raises:
        UserError: the model has an operation of which torch knows no such form.
    """
    if not enabled:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA is first used
    before, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        operation = str(error).split(" does not have")[0].split()[-1]
        raise UserError(
            f"--deterministic: torch's {operation} has no such form on this device; choose another --model or --device cpu."
        ) from None
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark
