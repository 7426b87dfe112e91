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
    """Everything ``fastadvisor train`` can be told."""

    @classmethod
    def has_flag(cls, name: str) -> bool:
        """Return whether the setting ``name`` is a flag of the command; in files it may stand in any case."""
        return True


@dataclass
class GridConfig:
    """Which runs are compared."""

    TITLE: ClassVar = "Runs"

    methods: Annotated[str, ESSENTIAL] = "ce,meta-only,mw-net,mfrw-mes"
    """Methods to compare, separated by commas."""
    seeds: Annotated[Count, ESSENTIAL] = 1
    """Runs a method, with seeds --seed, --seed + 1, ..."""


@dataclass
class CompareConfig(Config, GridConfig):
    """``fastadvisor compare``: the settings of train, for several methods and seeds."""

    @classmethod
    def has_flag(cls, name: str) -> bool:
        """Return whether the setting ``name`` is a flag of the command."""
        return name != "method"


@dataclass
class ThoroughnessConfig:
    """How closely a data set is looked at."""

    TITLE: ClassVar = "Check"

    decode: Annotated[bool, ESSENTIAL] = True
    """Decode every image; off: files are read and compared only."""


@dataclass
class CheckConfig(Config, ThoroughnessConfig):
    """``fastadvisor data check``: the settings of train; those that concern no data are passed over."""

    @classmethod
    def has_flag(cls, name: str) -> bool:
        """Return whether the setting ``name`` is a flag of the command."""
        own = (field.name for kind in (DataConfig, ThoroughnessConfig) for field in fields(kind))
        return name in (*own, "max_bad_fraction", "seed", "output")
