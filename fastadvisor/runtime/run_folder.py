"""A run's folder: ``config.yaml``, ``metrics.jsonl``, ``summary.json`` and checkpoints.

Another run never overwrites what is in it, and a crash leaves each file either as it was or complete.
"""

import json
import math
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from fastadvisor.config import Config, to_dict
from fastadvisor.errors import UserError

RUN_FILES = ("config.yaml", "metrics.jsonl", "summary.json", "last.pt", "best.pt", "model.pt")
# What may change between the parts of a resumed run: nothing in here touches the numbers. epochs does (the schedule).
MAY_DIFFER = ("output", "resume", "device", "progress", "tensorboard", "eval_batch_size")


class RunFolder:
    """The files of one run, under ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self.last = self.path / "last.pt"
        self.best = self.path / "best.pt"
        self.model = self.path / "model.pt"

    @classmethod
    def create(cls, output: str | None, config: Config, default_name: str) -> "RunFolder":
        """Make the folder of a new run and write its ``config.yaml``.

        Args:
            output: the folder; None makes a new one, ``runs/<time>-<default_name>``.
            config: the resolved configuration.
            default_name: last part of the name made up here.

        Raises:
            UserError: the folder holds something already, is a file, or cannot be written.
        """
        try:
            folder = cls(_unique(default_name) if output is None else _empty(Path(output)))
            folder.write_config(config)
        except OSError as error:
            where = output or "runs"
            raise UserError(f"Output folder {where} cannot be written ({error.strerror}); choose another --output.") from None
        return folder

    @classmethod
    def open_for_resume(cls, output: str | None, config: Config) -> "RunFolder":
        """Open the folder of a run that is to be continued with ``config``.

        Raises:
            UserError: no folder named, nothing in it to continue from, or a setting differs (named with both values).
        """
        if output is None:
            raise UserError("--resume continues the run in a folder; name it with --output.")
        folder = cls(Path(output))
        if not folder.last.is_file():
            raise UserError(f"There is no last.pt in {output} to resume from; check --output, or drop --resume.")
        before = folder._read_config()
        now = yaml.safe_load(yaml.safe_dump(to_dict(config)))
        for key in [*now, *(key for key in before if key not in now)]:
            old, new = before.get(key, "not set"), now.get(key, "not set")
            if key not in MAY_DIFFER and old != new:
                raise UserError(
                    f"{key} is {old!r} in {folder.config} and {new!r} now; resume with the settings of the run "
                    f"(--config {folder.config}), or choose another --output."
                )
        return folder

    def write_config(self, config: Config) -> None:
        """Write the resolved configuration, in the form that ``--config`` reads."""
        write_text(self.config, yaml.safe_dump(to_dict(config), sort_keys=False))

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Append one epoch's metrics as a line of JSON; NaN and infinities become null."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(metrics), allow_nan=False) + "\n")

    def keep_metrics(self, epochs: int) -> None:
        """Drop the metrics after the first ``epochs`` lines: a resumed run writes them again."""
        if self.metrics.is_file():
            lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)[:epochs]
            write_text(self.metrics, "".join(line for line in lines if line.endswith("\n")))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``; NaN and infinities become null."""
        write_text(self.summary, json.dumps(_finite(summary), allow_nan=False, indent=2) + "\n")

    def _read_config(self) -> dict[str, Any]:
        try:
            values = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            values = None
        if not isinstance(values, dict):
            raise UserError(f"{self.config} is missing or damaged, so the run cannot be resumed; choose another --output.")
        return values


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a reader, or a crash, never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _empty(path: Path) -> Path:
    """Return ``path`` as an empty folder, made if need be; a UserError if there is anything in it."""
    if path.exists() and not path.is_dir():
        raise UserError(f"--output {path} is a file; name a folder.")
    path.mkdir(parents=True, exist_ok=True)
    found = {entry.name for entry in path.iterdir()}
    if found.intersection(RUN_FILES):
        raise UserError(f"Output folder {path} already holds a run; choose another --output, or add --resume to continue it.")
    if found:
        raise UserError(f"Output folder {path} is not empty (it holds {min(found)}); choose another --output.")
    return path


def _unique(name: str) -> Path:
    """Make and return ``runs/<time>-<name>``, with -2, -3, ... where that exists."""
    runs = Path("runs")
    runs.mkdir(exist_ok=True)
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{name.replace('/', '-')}"
    for path in (runs / (stem if count == 1 else f"{stem}-{count}") for count in range(1, 1000)):
        try:
            path.mkdir()  # the test and the claim in one: two runs started at once get two folders
        except FileExistsError:
            continue
        return path
    raise UserError(f"There are 999 folders called runs/{stem}; name one with --output.")


def _finite(value: Any) -> Any:
    """Return ``value`` with every NaN and infinity in it as None: JSON has neither."""
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
