"""Several runs in one folder: their settings, which are finished already, and their summaries."""

import shlex
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from fastadvisor.commands.train import train_config
from fastadvisor.config import CompareConfig, Config, add_method_settings, select_settings
from fastadvisor.datasets import Source
from fastadvisor.errors import Interrupted, UserError
from fastadvisor.runtime.run_folder import RunFolder
from fastadvisor.training.saved_run import SavedRun
from fastadvisor.training.trainer import TrainResult


def open_folder(config: CompareConfig) -> tuple[Path, bool]:
    """Return the folder of the comparison, and whether one in it is continued.

    Raises:
        UserError: it holds something already, cannot be read, or there is nothing in it to resume.
    """
    default = f"runs/{datetime.now():%Y%m%d-%H%M%S}-compare-{config.dataset}"
    folder = Path(default if config.output is None else config.output)  # made with its first run
    if config.resume and config.output is None:
        raise UserError("--resume continues the comparison in a folder; name it with --output.")
    try:
        if folder.is_file():
            raise UserError(f"--output {folder} is a file; name a folder.")
        found = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        runs = any((folder / name / "config.yaml").is_file() for name in found)
    except OSError as error:
        raise UserError(f"Output folder {folder} cannot be read ({error.strerror}); choose another --output.") from None
    resumes = runs if config.resume == "auto" else config.resume
    if resumes and not runs:
        raise UserError(f"There is no comparison in {folder} to resume; check --output, or drop --resume.")
    if found and not resumes:
        way = ", or add --resume to continue it" if runs else ""
        raise UserError(f"Output folder {folder} is not empty; choose another --output{way}.")
    return folder, resumes


def load_or_train(
    config: CompareConfig,
    method: str,
    seed: int,
    folder: Path,
    source: Source,
    *,
    resumes: bool,
    check: Callable[[dict[str, Any]], object],
) -> dict[str, Any]:
    """Return the summary of one run of the comparison in ``folder``: read if it is finished, else trained.

    Args:
        config: of the comparison.
        method: of the run.
        seed: of the run.
        folder: of the comparison; the run's folder is in it.
        source: the data set, read already.
        resumes: whether a run that is there is continued, or taken as it is.
        check: reads what is needed of a summary; raises KeyError or TypeError where it is missing.

    Raises:
        UserError: a run that is there has other settings, or its summary is damaged.
        Interrupted: says how to go on with the comparison.
    """
    run = folder / f"{method}-seed{seed}"
    settings = _run_settings(config, method, seed, run, resume=resumes and (run / "config.yaml").is_file())
    if resumes and (run / "summary.json").is_file():
        RunFolder(run).check_settings(settings)
        return _read_summary(run, check)
    try:
        result = train_config(settings, source)
    except Interrupted as stop:
        raise Interrupted(
            f"{stop} (the comparison: its own command, --output {shlex.quote(str(folder))} --resume)", stop.signal
        ) from None
    assert isinstance(result, TrainResult)  # no dry run
    return result.summary


def _run_settings(config: CompareConfig, method: str, seed: int, run: Path, resume: bool) -> Config:
    return replace(
        select_settings(add_method_settings(Config), config), method=method, seed=seed, output=str(run), resume=resume
    )


def _read_summary(run: Path, check: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    saved = SavedRun.open(run)
    summary = saved.summary()
    try:
        check(summary)
    except (KeyError, TypeError):
        raise UserError(f"{saved.folder.summary} is damaged; delete it, and --resume writes it again.") from None
    return summary
