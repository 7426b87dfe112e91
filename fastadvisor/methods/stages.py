"""The stages of a run: what each trains, on which images, at what rate."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Stage:
    """A part of the run, with a schedule of its own from start to end."""

    source: Literal["train", "meta"] = "train"
    """Which images it trains on."""
    fraction: float = 1.0
    """Of the epochs."""
    lr_factor: float = 1.0
    """Of ``--lr``."""
    sampler: str = "shuffled"
    """How its epochs are drawn: a name in loading/samplers.py."""
    trains: Literal["all", "head"] = "all"
    """head: the backbone is frozen, its normalisations and dropout included, which behave as in testing."""
    reset_head: bool = False
    """Begin with a new head, as the model would have been built with."""
