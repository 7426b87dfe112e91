"""fastadvisor: train image classifiers on wrong labels and unequal classes."""

from typing import TYPE_CHECKING, Any

from fastadvisor.version import __version__

if TYPE_CHECKING:
    from fastadvisor.commands.compare import compare
    from fastadvisor.commands.dry_run import DryRun
    from fastadvisor.commands.evaluate import evaluate_run as evaluate
    from fastadvisor.commands.export import export_run as export
    from fastadvisor.commands.train import train
    from fastadvisor.config import CompareConfig, Config
    from fastadvisor.errors import UserError
    from fastadvisor.training.meta_step import MetaStep
    from fastadvisor.training.trainer import TrainResult

__all__ = [
    "CompareConfig",
    "Config",
    "DryRun",
    "MetaStep",
    "TrainResult",
    "UserError",
    "__version__",
    "compare",
    "evaluate",
    "export",
    "train",
]

_HOMES = {
    "CompareConfig": ("fastadvisor.config", "CompareConfig"),
    "Config": ("fastadvisor.config", "Config"),
    "DryRun": ("fastadvisor.commands.dry_run", "DryRun"),
    "MetaStep": ("fastadvisor.training.meta_step", "MetaStep"),
    "TrainResult": ("fastadvisor.training.trainer", "TrainResult"),
    "UserError": ("fastadvisor.errors", "UserError"),
    "compare": ("fastadvisor.commands.compare", "compare"),
    "evaluate": ("fastadvisor.commands.evaluate", "evaluate_run"),
    "export": (
        "fastadvisor.commands.export",
        "export_run",
    ),  # no module may be called as a function here: it would take its place
    "train": ("fastadvisor.commands.train", "train"),
}


def __dir__() -> list[str]:
    """Name what there is, imported or not."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Import on first use, so that the command line can answer ``--help`` without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fastadvisor' has no attribute {name!r}")
    from importlib import import_module

    if name in ("Config", "CompareConfig"):
        import_module("fastadvisor.methods")  # whose settings are among those of every configuration
        from fastadvisor import config

        return config.add_method_settings(getattr(config, name))
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)
