"""Who follows a run: what is written and shown of its iterations and epochs, without a word of it in the trainer's loop."""

import logging
from collections.abc import Mapping
from typing import Any, Protocol

from tqdm import tqdm

from fastadvisor.iterations import StepResult
from fastadvisor.loading import Batch
from fastadvisor.metagrad import Engine, ValidatedEngine
from fastadvisor.methods.collapse import Collapse
from fastadvisor.runtime.logger import TensorBoard
from fastadvisor.runtime.run_folder import RunFolder
from fastadvisor.training import messages

logger = logging.getLogger(__name__)


class Observer(Protocol):
    """Is told of every iteration and every epoch of a run, in their order, and changes nothing."""

    def step(self, result: StepResult, batch: Batch) -> None:
        """Take note of an iteration on the training batch ``batch``.

        Reading a tensor of ``result`` waits for the device. With ``--cuda-graph`` the next iteration writes into it: copy what
        is to be kept.
        """
        ...

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Take note of an epoch, before it is saved; ``record`` is its line of ``metrics.jsonl``."""
        ...


class Metrics:
    """Appends the record of each epoch to ``metrics.jsonl``."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def step(self, result: StepResult, batch: Batch) -> None:
        """Do nothing."""

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Append a line."""
        self._folder.append_metrics(record)


class Scalars:
    """Writes the numbers of each epoch for TensorBoard."""

    def __init__(self, board: TensorBoard) -> None:
        self._board = board

    def step(self, result: StepResult, batch: Batch) -> None:
        """Do nothing."""

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Write the numbers at the epoch's number, counted from 1."""
        self._board.scalars(record["epoch"], {key: value for key, value in record.items() if isinstance(value, float)})


class ProgressBar:
    """Moves a progress bar, with the last comparison with the exact meta-gradient beside it."""

    def __init__(self, bar: "tqdm[Any]", engine: Engine | None) -> None:
        self._bar, self._engine = bar, engine

    def step(self, result: StepResult, batch: Batch) -> None:
        """Move on by one iteration."""
        engine = self._engine
        if isinstance(engine, ValidatedEngine) and engine.checks:
            last = engine.checks[-1]
            state = ", exact for now" if engine.falling_back else ""
            text = f"cosine to exact {last.cosine:.3f}, norm ratio {last.norm_ratio:.2f}{state}"
            self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Do nothing."""


class Lines:
    """Logs a line an epoch, and a note when the advisor has collapsed."""

    def __init__(self, epochs: int, collapse: Collapse) -> None:
        self._epochs, self._collapse = epochs, collapse

    def step(self, result: StepResult, batch: Batch) -> None:
        """Do nothing."""

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Log what there is to say of the epoch."""
        shares = {key: value for key, value in record.items() if key.endswith("_saturated")}
        if (sentence := self._collapse.sentence(shares)) is not None:
            logger.warning(sentence)
        logger.info(messages.epoch_line(dict(record), self._epochs))
