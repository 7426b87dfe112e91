"""TensorBoard, where it is installed."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_said = False


class TensorBoard:
    """Writes scalars for TensorBoard; does nothing where tensorboard is not installed (and says so, once a process).

    Args:
        folder: where the event files go; None turns it off.
        purge_step: on resume, the first step to be written again; older events from there on are hidden.
    """

    def __init__(self, folder: Path | None, purge_step: int | None = None) -> None:
        self._writer: Any = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            _say_missing()
        else:
            self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write ``values`` at ``step``."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what is left."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _say_missing() -> None:
    global _said
    if not _said:
        logger.warning("No TensorBoard files: tensorboard is not installed (pip install tensorboard).")
    _said = True
