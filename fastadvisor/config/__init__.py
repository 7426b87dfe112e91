"""Every setting, typed, with its default and its source; one dataclass per component (``settings.py``).

Names are flat: the field ``noise_rate``, the flag ``--noise-rate``, the YAML key ``noise_rate`` and the keyword
``fastadvisor.train(noise_rate=0.4)`` are the same setting. ``Config`` inherits from the components, so a component takes
its own dataclass and may be handed the whole configuration.

Layers, later ones win: the defaults below, the data set's recipe (``recipes/<dataset>.yaml``), the file or recipe
named by ``config``, flags or keywords.
"""

from fastadvisor.config.layers import check_keys, completed, configured, read_layer, resolve, to_dict, validated
from fastadvisor.config.paths import LISTS, PATHS, absolute, local, moved
from fastadvisor.config.settings import (
    CheckConfig,
    CompareConfig,
    Config,
    DataConfig,
    LoaderConfig,
    MetaConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
)

__all__ = [
    "LISTS",
    "PATHS",
    "CheckConfig",
    "CompareConfig",
    "Config",
    "DataConfig",
    "LoaderConfig",
    "MetaConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "absolute",
    "check_keys",
    "completed",
    "configured",
    "local",
    "moved",
    "read_layer",
    "resolve",
    "to_dict",
    "validated",
]
