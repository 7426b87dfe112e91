"""Every setting of a command, composed from the components."""

from dataclasses import dataclass, fields
from typing import Annotated, ClassVar

from fastadvisor.config.data import DataConfig, LoaderConfig
from fastadvisor.config.learning import MetaConfig, ModelConfig, OptimizerConfig
from fastadvisor.config.metadata import ESSENTIAL, Count
from fastadvisor.config.methods import MethodConfig
from fastadvisor.config.run import RunConfig


@dataclass
class Config(RunConfig, OptimizerConfig, MetaConfig, MethodConfig, ModelConfig, LoaderConfig, DataConfig):
    """All settings of ``fastadvisor train``."""

    @classmethod
    def has_flag(cls, name: str) -> bool:
        """Return whether the setting ``name`` is a flag of the command; a file may hold it even if it is not."""
        return True


@dataclass
class GridConfig:
    """Which runs are compared."""

    TITLE: ClassVar = "Runs"

    methods: Annotated[str, ESSENTIAL] = "ce,meta-only,mw-net,mfrw-mes"
    """Methods to compare, separated by commas."""
    seeds: Annotated[Count, ESSENTIAL] = 1
    """Runs of each method, with the seeds --seed, --seed + 1, ..."""


@dataclass
class CompareConfig(Config, GridConfig):
    """``fastadvisor compare``: the settings of train, for several methods and seeds."""

    @classmethod
    def has_flag(cls, name: str) -> bool:
        """Return whether the setting ``name`` is a flag of the command."""
        return name != "method"


@dataclass
class ThoroughnessConfig:
    """How thoroughly a data set is checked."""

    TITLE: ClassVar = "Check"

    decode: Annotated[bool, ESSENTIAL] = True
    """Decode every image; off: only read and compare the files."""


@dataclass
class CheckConfig(Config, ThoroughnessConfig):
    """``fastadvisor data check``: the settings of train, of which only those about data have an effect."""

    @classmethod
    def has_flag(cls, name: str) -> bool:
        """Return whether the setting ``name`` is a flag of the command."""
        own = (field.name for kind in (DataConfig, ThoroughnessConfig) for field in fields(kind))
        return name in (*own, "max_bad_fraction", "seed", "output")
