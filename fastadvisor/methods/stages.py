"""The stages of a run: on which images each one trains, which layers, and at which learning rate."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Stage:
    """A part of the run, over which the learning rate follows a whole schedule of its own."""

    source: Literal["train", "meta"] = "train"
    """Whether it trains on the training set or on the meta-set."""
    fraction: float = 1.0
    """Fraction of the epochs of the run."""
    lr_factor: float = 1.0
    """Learning rate of the stage, divided by ``--lr``."""
    sampler: str = "shuffled"
    """Name of the sampler that draws its epochs (loading/samplers.py)."""
    trains: Literal["all", "head"] = "all"
    """Which layers learn. head: the backbone is frozen, and its normalisations and dropout behave as at test time."""
    reset_head: bool = False
    """Whether the stage begins with a newly initialised head."""
