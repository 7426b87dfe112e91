"""A run's folder, opened to use what it has trained."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastadvisor.config import Config, resolve
from fastadvisor.data import TrainingData, load_source, prepare
from fastadvisor.errors import UserError
from fastadvisor.models import SplitClassifier, build_model
from fastadvisor.runtime import checkpoint as checkpoints
from fastadvisor.runtime.run_folder import RunFolder

CHECKPOINTS = ("model", "best", "last")


@dataclass
class SavedRun:
    """The classifier of a run, its settings and its classes."""

    folder: Path
    checkpoint: str
    """model (the finished classifier), best or last."""
    config: Config
    """As the run had them, but that the weights come from the checkpoint."""
    classes: list[str]
    """In the order of the logits."""
    state: dict[str, Any] = field(repr=False)
    """The classifier's state dict."""

    @classmethod
    def open(cls, run: str | os.PathLike[str], checkpoint: str = "model", data_root: str | None = None) -> "SavedRun":
        """Open the run in the folder ``run``.

        Args:
            run: the folder.
            checkpoint: one of ``CHECKPOINTS``.
            data_root: where the data set lies now; None: where it lay.

        Raises:
            UserError: no such run or checkpoint, or a damaged one.
        """
        folder = RunFolder(Path(run).expanduser())
        if not os.path.isfile(folder.config):  # Path.is_file raises where the folder may not be read
            raise UserError(f"{folder.path} is not a run folder (no config.yaml in it); name the folder that train printed.")
        if checkpoint not in CHECKPOINTS:
            raise UserError(f"There is no checkpoint {checkpoint!r}: take {', '.join(CHECKPOINTS)}.")
        config = resolve(Config, str(folder.config), **({} if data_root is None else {"data_root": data_root}))
        path = folder.path / f"{checkpoint}.pt"
        if not path.is_file():
            best = ", or try --checkpoint best" if folder.best.is_file() else ""
            raise UserError(f"{folder.path} holds no {checkpoint}.pt; let the run finish ({folder.how_to_go_on()}){best}.")
        config.pretrained, config.weights = False, None
        if checkpoint == "model":
            return cls(folder.path, checkpoint, config, _classes(folder), checkpoints.classifier(path))
        state = checkpoints.load(path)
        with checkpoints.fitting(path):
            classes = [str(name) for name in state["classes"]]
        return cls(folder.path, checkpoint, config, classes, checkpoints.classifier_of(state, path))

    @property
    def path(self) -> Path:
        """Of the checkpoint."""
        return self.folder / f"{self.checkpoint}.pt"

    def data(self) -> TrainingData:
        """Return the run's data set, its classes in the order of the logits.

        Raises:
            UserError: the data set is not there, or has other classes.
        """
        source = load_source(self.config)
        if self.classes:
            differing = set(self.classes) ^ set(source.classes)
            if differing:
                raise UserError(
                    f"{self.folder} was trained on other classes than the data set has ({min(differing)!r} is in one only); "
                    "check --data-root."
                )
            source = source.in_order(self.classes)
        return prepare(source, self.config, self.config.seed)

    def model(self, classes: int, size: int) -> SplitClassifier:
        """Return the classifier for ``classes`` and images of ``size`` pixels, on the CPU, in evaluation mode.

        Raises:
            UserError: the checkpoint is of another model.
        """
        model = build_model(self.config, classes, (size, size))
        checkpoints.load_model_state(model.model, self.state, self.path)
        return model.eval()


def _classes(folder: RunFolder) -> list[str]:
    """Return the classes of the finished run; none where no file tells, as of runs of earlier versions."""
    for file, key in ((folder.provenance, "classes"), (folder.summary, "per_class_top1")):
        try:
            return [str(name) for name in json.loads(file.read_text(encoding="utf-8"))[key]]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return []
