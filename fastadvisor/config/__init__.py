"""Every setting, typed, with its default, its source and what it belongs to.

Names are flat: the field ``noise_rate``, the flag ``--noise-rate``, the YAML key ``noise_rate`` and the keyword
``fastadvisor.train(noise_rate=0.4)`` are the same setting. ``Config`` is composed of small dataclasses, one a component
(``data.py``, ``learning.py``, ``methods.py``, ``run.py``), and inherits from them, so a component takes its own dataclass and
may be handed the whole configuration. The settings of a single method may live in its own file (``registry.py``).

Layers, later ones win: the defaults, the data set's recipe (``recipes/<dataset>.yaml``), the file or recipe named by
``config``, flags or keywords (``layers.py``).
"""

from fastadvisor.config.catalogue import Setting, list_settings
from fastadvisor.config.data import DataConfig, LoaderConfig
from fastadvisor.config.layers import (
    UnknownSetting,
    add_implied,
    build_config,
    check_keys,
    read_layer,
    resolve,
    to_dict,
    validate,
)
from fastadvisor.config.learning import MetaConfig, ModelConfig, OptimizerConfig
from fastadvisor.config.metadata import ESSENTIAL, GIVEN, Count, Fraction, NonNegative, Only, Positive
from fastadvisor.config.methods import AdvisorConfig, MethodConfig
from fastadvisor.config.near_misses import answer_near_miss
from fastadvisor.config.paths import LISTS, PATHS, expand_user, make_absolute, move_lists
from fastadvisor.config.registry import (
    add_method_settings,
    methods_that_use,
    register_method,
    registered_methods,
    select_settings,
)
from fastadvisor.config.run import RunConfig
from fastadvisor.config.settings import CheckConfig, CompareConfig, Config

__all__ = [
    "ESSENTIAL",
    "GIVEN",
    "LISTS",
    "PATHS",
    "AdvisorConfig",
    "CheckConfig",
    "CompareConfig",
    "Config",
    "Count",
    "DataConfig",
    "Fraction",
    "LoaderConfig",
    "MetaConfig",
    "MethodConfig",
    "ModelConfig",
    "NonNegative",
    "Only",
    "OptimizerConfig",
    "Positive",
    "RunConfig",
    "Setting",
    "UnknownSetting",
    "add_implied",
    "add_method_settings",
    "answer_near_miss",
    "build_config",
    "check_keys",
    "expand_user",
    "list_settings",
    "make_absolute",
    "methods_that_use",
    "move_lists",
    "read_layer",
    "register_method",
    "registered_methods",
    "resolve",
    "select_settings",
    "to_dict",
    "validate",
]
