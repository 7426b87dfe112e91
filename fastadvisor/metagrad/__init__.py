"""The meta-gradient: how the advisor learns from what its advice did to the classifier. Derivation: README.md here."""

from typing import NamedTuple

from fastadvisor.config import MetaConfig
from fastadvisor.errors import UserError
from fastadvisor.metagrad.base import Engine, MetaGradient, MetaProblem
from fastadvisor.metagrad.forward import ForwardEngine, Tangent
from fastadvisor.metagrad.layerwise import GradientSamplers, LayerwiseEngine, LearnedLayers
from fastadvisor.metagrad.reference import ReferenceEngine
from fastadvisor.metagrad.shared_pass import Plan, SharedForward, SharedPass
from fastadvisor.metagrad.validated import ValidatedEngine
from fastadvisor.metagrad.virtual_step import VirtualStep
from fastadvisor.methods import Method
from fastadvisor.models import SplitClassifier, cut_at, layers_of
from fastadvisor.runtime.console import log_notes
from fastadvisor.runtime.execution import Execution

__all__ = [
    "Engine",
    "ForwardEngine",
    "GradientSamplers",
    "LayerwiseEngine",
    "LearnedLayers",
    "MetaGradient",
    "MetaProblem",
    "MetaSchedule",
    "Plan",
    "ReferenceEngine",
    "SharedForward",
    "SharedPass",
    "ValidatedEngine",
    "VirtualStep",
    "build_engine",
    "check_meta",
    "meta_schedule",
]

APPROX_INTERVAL = 2
"""Iterations from one meta step to the next with --approx-meta: docs/results/approximation.md."""


class MetaSchedule(NamedTuple):
    """When a meta step is taken, and after what."""

    interval: int
    """Every so many iterations."""
    behind: bool
    """After the actual step's gradient, with the advisor one step behind."""


def check_meta(config: MetaConfig, method: type[Method], *, amp: bool) -> None:
    """Find out from the settings alone, before any data is read, whether they exclude each other.

    Raises:
        UserError: they do.
    """
    if config.meta_engine == "reference":
        behind = config.virtual_gradient == "actual"  # whose graph is gone before the meta step
        asked_for = ("--approx-meta", config.approx_meta), ("--lean", config.lean), ("--virtual-gradient actual", behind)
        for flag, asked in asked_for:
            if asked:
                raise UserError(f"{flag} is of the forward engine; drop it or --meta-engine reference.")
    if config.approx_meta and config.approx_tangent == "difference" and amp:
        raise UserError("--approx-tangent difference needs float32: add --no-amp, or take forward.")
    schedule = meta_schedule(config, method)
    if method.of_one_batch and schedule != MetaSchedule(1, behind=False):
        flag = "--meta-interval" if schedule.interval > 1 else "--virtual-gradient actual"
        raise UserError(f"{flag}: {method.__name__} weighs each batch by a meta step of its own and keeps no advisor; drop it.")


def meta_schedule(config: MetaConfig, method: type[Method]) -> MetaSchedule:
    """Return when ``config`` takes meta steps of ``method``."""
    approximate = config.approx_meta and not method.of_one_batch
    interval = config.meta_interval or (APPROX_INTERVAL if approximate else 1)
    return MetaSchedule(interval, config.virtual_gradient == "actual" or (config.virtual_gradient == "auto" and approximate))


def build_engine(config: MetaConfig, model: SplitClassifier, image_shape: tuple[int, int], execution: Execution) -> Engine:
    """Return the engine ``config`` asks for.

    Args:
        config: the meta-gradient's settings.
        model: the classifier, on its device.
        image_shape: (height, width) of its images, to try where it can be cut.
        execution: how passes are run.
    """
    if config.meta_engine == "reference":
        return ReferenceEngine(execution)
    if not config.approx_meta:
        return ForwardEngine(execution)
    approximate = _approximate(config, model, image_shape, execution)
    if not config.validate_meta_every or approximate == ForwardEngine(execution):
        return approximate
    exact, ranks = ForwardEngine(execution), execution.ranks
    return ValidatedEngine(approximate, exact, config.validate_meta_every, config.min_meta_cosine, ranks=ranks)


def _approximate(config: MetaConfig, model: SplitClassifier, image_shape: tuple[int, int], execution: Execution) -> Engine:
    if config.approx_tangent == "difference" and model.device.type != "cpu":
        raise UserError("--approx-tangent difference needs float32 in full, and a GPU convolves in TF32: take forward.")
    # A GPU convolves in TF32 unless told otherwise, whose rounding is longer than the difference.
    rounded = execution.dtype is not None or model.device.type != "cpu"
    tangent: Tangent = config.approx_tangent if config.approx_tangent != "auto" else "forward" if rounded else "difference"
    if config.approx_layers == "all":
        return ForwardEngine(execution, tangent=tangent)
    if config.approx_layers == "top":
        cut = cut_at(model, image_shape, config.approx_stages)
        if cut is None:
            log_notes([f"{model.name} cannot be cut below its top {config.approx_stages} stages: all layers count."])
        return ForwardEngine(execution, cut, tangent=tangent)
    layers = layers_of(model, image_shape)
    if len(layers) <= config.approx_budget:
        log_notes([f"{model.name} has no more than {len(layers)} layers that can be told apart: all of them count."])
        return ForwardEngine(execution, tangent=tangent)
    learned = None
    if config.approx_layers == "learned":
        samplers = GradientSamplers(len(layers)).to(model.device)
        learned = LearnedLayers(samplers, config.approx_budget)
    return LayerwiseEngine(ForwardEngine(execution, tangent=tangent), model, layers, config.approx_budget, learned)
