"""A run's folder, opened to use what it has trained."""

import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from fastadvisor.config import Config, resolve
from fastadvisor.datasets import TrainingData, load_source, prepare
from fastadvisor.errors import UserError
from fastadvisor.loading.choose import choose_geometry
from fastadvisor.methods import METHODS, DataFacts, Method, build_method, check_method
from fastadvisor.methods.base import Adjusted
from fastadvisor.models import SplitClassifier, build_model
from fastadvisor.runtime import checkpoint as checkpoints
from fastadvisor.runtime.run_folder import RunFolder

CHECKPOINTS = ("model", "best", "last")
"""The finished classifier, that of the best epoch, and that of the last save."""


@dataclass
class SavedRun:
    """What a run has left: its settings and classes, its classifiers, its data and what was measured.

    Nothing is read before it is asked for, so that a run whose data set is gone still gives its classifier.
    """

    folder: RunFolder
    config: Config
    """As the run had them, but that the weights come from a checkpoint."""
    _weights: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    """Of the checkpoints that have been read."""

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, data_root: str | None = None) -> "SavedRun":
        """Open the run in ``folder``.

        Args:
            folder: of the run.
            data_root: where the data set lies now; None: where it lay.

        Raises:
            UserError: no such run, or its settings are damaged.
        """
        opened = RunFolder(Path(folder).expanduser())
        if not os.path.isfile(opened.config):  # Path.is_file raises where the folder may not be read
            raise UserError(f"{opened.path} is not a run folder (no config.yaml in it); name the folder that train printed.")
        config = resolve(Config, str(opened.config), **({} if data_root is None else {"data_root": data_root}))
        check_method(config.method)
        config.pretrained, config.weights = False, None
        return cls(opened, config)

    @cached_property
    def classes(self) -> list[str]:
        """In the order of the logits; empty where no file tells, as of unfinished runs of earlier versions."""
        for file, key in ((self.folder.provenance, "classes"), (self.folder.summary, "per_class_top1")):
            try:
                return [str(name) for name in json.loads(file.read_text(encoding="utf-8"))[key]]
            except (OSError, ValueError, KeyError, TypeError):
                continue
        for path in (self.folder.last, self.folder.best):
            if path.is_file():
                state = checkpoints.load(path)
                with checkpoints.refuse_misfit(path):
                    return [str(name) for name in state[checkpoints.CLASSES]]
        return []

    def path(self, checkpoint: str = "model") -> Path:
        """Return the file of a checkpoint, one of ``CHECKPOINTS``.

        Raises:
            UserError: there is no such checkpoint.
        """
        if checkpoint not in CHECKPOINTS:
            raise UserError(f"There is no checkpoint {checkpoint!r}: take {', '.join(CHECKPOINTS)}.")
        folder = self.folder
        path = folder.path / f"{checkpoint}.pt"
        if not path.is_file():
            best = ", or try --checkpoint best" if folder.best.is_file() else ""
            raise UserError(f"{folder.path} holds no {checkpoint}.pt; let the run finish ({folder.resume_command()}){best}.")
        return path

    def weights(self, checkpoint: str = "model") -> dict[str, Any]:
        """Return the state dict of the plain classifier in a checkpoint: the average of its weights if there is one.

        Raises:
            UserError: there is no such checkpoint, or it is damaged.
        """
        path = self.path(checkpoint)
        if checkpoint not in self._weights:
            self._weights[checkpoint] = checkpoints.read_classifier(path)
        return self._weights[checkpoint]

    def model(self, checkpoint: str = "model", size: int | None = None) -> SplitClassifier:
        """Return the classifier of a checkpoint, on the CPU, in evaluation mode.

        Args:
            checkpoint: one of ``CHECKPOINTS``.
            size: side in pixels of the images that it is to take; None: of those it was trained on.

        Raises:
            UserError: there is no such checkpoint, it is damaged or of another model, or the model takes no images of ``size``.
        """
        weights = self.weights(checkpoint)
        size = self.image_size() if size is None else size
        model = build_model(self.config, len(self.classes or self.data().classes), (size, size))
        checkpoints.load_model_state(model.model, weights, self.path(checkpoint))
        return model.eval()

    def tested_model(self, checkpoint: str = "model", size: int | None = None) -> nn.Module:
        """Return :meth:`model` as the run tested it: with :meth:`Method.adjust` applied to its logits, if the method has one.

        Args:
            checkpoint: one of ``CHECKPOINTS``.
            size: side in pixels of the images that it is to take; None: of those it was trained on.

        Raises:
            UserError: as :meth:`model`; for a method that adjusts logits, also as :meth:`data`.
        """
        model = self.model(checkpoint, size)
        if METHODS[self.config.method].adjust is Method.adjust:
            return model
        data = self.data()
        facts = DataFacts(len(data.classes), len(data.labels), data.label_counts())
        return Adjusted(model, build_method(self.config, model.head.in_features, facts)).eval()

    def image_size(self) -> int:
        """Return the side in pixels of the images of a batch; of a run that has not finished it is found from the data.

        Raises:
            UserError: as :meth:`data`.
        """
        try:
            return int(json.loads(self.folder.summary.read_text(encoding="utf-8"))["image_size"])
        except (OSError, ValueError, KeyError, TypeError):
            return choose_geometry(self.config, self.data()).size

    def data(self) -> TrainingData:
        """Return the run's data set, its classes in the order of the logits; read once.

        Raises:
            UserError: the data set is not there, or has other classes.
        """
        return self._data

    @cached_property
    def _data(self) -> TrainingData:
        source = load_source(self.config)
        if self.classes:
            differing = set(self.classes) ^ set(source.classes)
            if differing:
                raise UserError(
                    f"{self.folder.path} was trained on other classes than the data set has ({min(differing)!r} is in one "
                    "only); check --data-root."
                )
            source = source.reorder_classes(self.classes)
        return prepare(source, self.config, self.config.seed)

    def history(self) -> list[dict[str, Any]]:
        """Return the records of the epochs so far, in order: what ``metrics.jsonl`` holds. NaN and infinities are None.

        Raises:
            UserError: the file is damaged.
        """
        path = self.folder.metrics
        try:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            return [dict(json.loads(line)) for line in lines if line.endswith("\n")]  # the last may be half written
        except FileNotFoundError:
            return []  # stopped in its first epoch
        except (OSError, ValueError, TypeError):
            raise UserError(f"{path} is damaged; last.pt beside it holds the same records under 'history'.") from None

    def summary(self) -> dict[str, Any]:
        """Return the content of ``summary.json``.

        Raises:
            UserError: the run has not finished, or the file is damaged.
        """
        path = self.folder.summary
        if not path.is_file():
            raise UserError(f"{self.folder.path} holds no summary.json; let the run finish ({self.folder.resume_command()}).")
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise UserError(f"{path} is damaged; delete it, and --resume writes it again.") from None
