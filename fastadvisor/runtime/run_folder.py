"""A run's folder: ``config.yaml``, ``metrics.jsonl``, ``summary.json`` and checkpoints.

Another run never overwrites what is in it, and a crash leaves each file either as it was or complete.
"""

import json
import math
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from fastadvisor.config import Config, make_absolute, move_lists, to_dict
from fastadvisor.errors import UserError, cannot_write
from fastadvisor.runtime import checkpoint

RUN_FILES = ("config.yaml", "metrics.jsonl", "summary.json", "last.pt", "best.pt", "model.pt", "run.json")
# What may change between the parts of a resumed run: nothing in here touches the numbers. epochs does (the schedule).
MAY_DIFFER = (
    "data_root",  # whose content is compared
    "output",
    "resume",
    "device",
    "progress",
    "tensorboard",
    "eval_batch_size",
    "keep_memory",
    "workers",
    "cache_dir",
    "max_bad_fraction",
    "save_minutes",
    "save_every",
    "keep",
    "nan_policy",
    "dry_run",
)


LENGTH = ("epochs", "iterations")
"""Settings that may differ if the schedule has been the same up to now."""

TEMPORARY = re.compile(r"\.config\.yaml\.\d+\.tmp")
"""Name of the only file that is left by a process that was killed while it created its folder."""


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
        self.bad_images = self.path / "bad_images.csv"
        self.provenance = self.path / "run.json"
        self.replay = self.path / "replay.pt"

    @staticmethod
    def check_free(output: str | None) -> None:
        """Refuse an ``output`` that :meth:`create` would refuse, before a data set is read for nothing.

        Raises:
            UserError: the folder holds something already, is a file, or cannot be read.
        """
        if output is not None:
            try:
                _check_empty(Path(output))
            except OSError as error:
                raise _no_folder(output, error) from None

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
            raise _no_folder(output or "runs", error) from None
        return folder

    @classmethod
    def open_for_resume(cls, output: str | None, config: Config) -> "RunFolder":
        """Open the folder of a run that is to be continued with ``config``, whose length may be another one.

        A run that was cut off before its first save has no ``last.pt``; it is opened too, to begin once more.

        Raises:
            UserError: no folder named, nothing in it to continue from, or a setting differs (named with both values).
        """
        if output is None:
            raise UserError("--resume continues the run in a folder; name it with --output.")
        folder = cls(Path(output))
        try:
            found = {name for name in RUN_FILES if (folder.path / name).is_file()}
        except OSError as error:
            raise UserError(f"Output folder {output} cannot be read ({error.strerror}); check --output.") from None
        if "last.pt" not in found and not {"config.yaml"} <= found <= {"config.yaml", "metrics.jsonl", "run.json", "best.pt"}:
            way = "choose another --output" if found else "check --output, or drop --resume"
            raise UserError(f"There is no last.pt in {output} to resume from; {way}.")
        folder.check_settings(config, but=LENGTH)
        return folder

    @classmethod
    def holds_run(cls, output: str | None) -> bool:
        """Return whether ``output`` is the folder of a run, be it one that was cut off before its first save.

        Raises:
            UserError: no folder named, or it cannot be read.
        """
        if output is None:
            raise UserError("--resume auto looks for the run in a folder; name it with --output.")
        try:
            return any((Path(output) / name).is_file() for name in RUN_FILES)
        except OSError as error:
            raise UserError(f"Output folder {output} cannot be read ({error.strerror}); check --output.") from None

    def length(self) -> int:
        """Return the epochs that the run in this folder was started for.

        Raises:
            UserError: its configuration is damaged.
        """
        epochs = self._read_config().get("epochs")
        if not isinstance(epochs, int):
            raise UserError(f"{self.config} is damaged, so the run cannot be resumed; choose another --output.")
        return epochs

    def check_settings(self, config: Config, but: Sequence[str] = ()) -> None:
        """Refuse to take the run in this folder for one with ``config``, whatever the settings ``but`` are.

        Raises:
            UserError: a setting that touches the numbers differs (named with both values).
        """
        now = make_absolute(yaml.safe_load(yaml.safe_dump(to_dict(config))))
        before = move_lists(make_absolute(self._read_config()), now.get("data_root"))
        for key in [*now, *(key for key in before if key not in now)]:
            old, new = before.get(key, "not set"), now.get(key, "not set")
            if key not in (*MAY_DIFFER, *but) and old != new:
                raise UserError(
                    f"{key} is {old!r} in {self.config} and {new!r} now; resume with the settings of the run "
                    f"(--config {shlex.quote(str(self.config))}), or choose another --output."
                )

    def write_config(self, config: Config) -> None:
        """Write the resolved configuration, in the form that ``--config`` reads, its paths absolute."""
        values = make_absolute({**to_dict(config), "resume": False})
        write_text(self.config, yaml.safe_dump(values, sort_keys=False))

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Append one epoch's metrics as a line of JSON; NaN and infinities become null."""
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_finite(metrics), allow_nan=False) + "\n")
        except OSError as error:
            raise cannot_write(self.metrics, error) from None

    def truncate_metrics(self, epochs: int) -> None:
        """Drop the metrics after the first ``epochs`` lines: a resumed run writes them again."""
        if self.metrics.is_file():
            lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)[:epochs]
            write_text(self.metrics, "".join(line for line in lines if line.endswith("\n")))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``; NaN and infinities become null."""
        write_text(self.summary, json.dumps(_finite(summary), allow_nan=False, indent=2) + "\n")

    def begin_part(self, about: Mapping[str, Any], data: str, classes: Sequence[str]) -> None:
        """Note in ``run.json`` how this part of the run was started; ``data`` is the fingerprint of its data, and ``classes``
        are in the order of the logits.

        Raises:
            UserError: earlier parts had other data.
        """
        parts: list[Any] = []
        if self.provenance.is_file():
            try:
                known = json.loads(self.provenance.read_text(encoding="utf-8"))
                before, parts = known["data"], list(known["parts"])
            except (OSError, ValueError, KeyError, TypeError):
                raise UserError(
                    f"{self.provenance} is damaged; delete it to go on without the check that the data are still the same."
                ) from None
            if before != data:
                raise UserError(
                    f"The data are not those {self.path} was trained on (fingerprint {data}, before {before}): "
                    f"restore them, choose another --output, or delete {self.provenance} to go on all the same."
                )
        write_text(
            self.provenance, json.dumps({"data": data, "classes": list(classes), "parts": [*parts, about]}, indent=2) + "\n"
        )

    def save_last(self, state: Mapping[str, Any], keep: int, iteration: int) -> None:
        """Write ``last.pt``; with ``keep`` over 1 the newest ``keep`` checkpoints have names of their own too,
        ``iteration-<number>.pt``, of which the last is the same file as ``last.pt``.
        """
        checkpoint.save(self.last, state)
        if keep > 1:
            named = self.path / f"iteration-{iteration:09d}.pt"
            try:
                named.unlink(missing_ok=True)
                try:
                    os.link(self.last, named)
                except OSError:  # a file system without hard links
                    shutil.copyfile(self.last, named)
                for old in checkpoint.list_kept(self.path)[keep:]:
                    old.unlink(missing_ok=True)
            except OSError as error:
                raise cannot_write(named, error) from None

    def clear_temporary(self) -> None:
        """Delete the temporary files of a process that was killed during a write."""
        for path in self.path.glob(".*.tmp"):
            path.unlink(missing_ok=True)

    def write_bad_images(self, table: str) -> None:
        """Write ``bad_images.csv``: part, id, reason and file of each image that could not be read."""
        write_text(self.bad_images, table)

    def resume_command(self) -> str:
        """Return the shell command that continues the run, which works from any folder."""
        config, output = (shlex.quote(os.path.abspath(path)) for path in (self.config, self.path))
        return f"fastadvisor train --config {config} --output {output} --resume"

    def _read_config(self) -> dict[str, Any]:
        try:
            values = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            values = None
        if not isinstance(values, dict):
            raise UserError(f"{self.config} is missing or damaged, so the run cannot be resumed; choose another --output.")
        return values


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a reader, or a crash, never sees half of it.

    Raises:
        UserError: the file cannot be written, such as on a full disk.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", errors="surrogateescape") as file:  # names of files in another encoding
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(output: str | None) -> None:
    """Find out, and leave nothing behind, whether a folder ``output`` (None: under ``runs``) can be made or written to.

    Raises:
        UserError: it cannot.
    """
    folder = Path(output or "runs").absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _no_folder(output or "runs", error) from None


def _no_folder(output: str, error: OSError) -> UserError:
    return UserError(f"Output folder {output} cannot be written ({error.strerror}); choose another --output.")


def _empty(path: Path) -> Path:
    """Return ``path`` as an empty folder, made if need be; a UserError if there is anything in it."""
    _check_empty(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def _check_empty(path: Path) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"--output {path} is a file; name a folder.")
    found = {entry.name for entry in path.iterdir() if not TEMPORARY.fullmatch(entry.name)}
    if found.intersection(RUN_FILES):
        raise UserError(f"Output folder {path} already holds a run; choose another --output, or add --resume to continue it.")
    if found:
        raise UserError(f"Output folder {path} is not empty (it holds {min(found)}); choose another --output.")


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
