"""The meta-gradient: how the advisor learns from the effect of its advice. Derivation: README.md in this folder."""

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
    """In which iterations a meta step is taken, and at which point of them."""

    interval: int
    """Number of iterations from one meta step to the next."""
    behind: bool
    """Whether the meta step comes after the gradient of the actual step, so that the advisor is one step behind."""


def check_meta(config: MetaConfig, method: type[Method], *, amp: bool) -> None:
    """Check the settings of the meta-gradient against each other, before any data is read.

    Args:
        config: the meta-gradient's settings.
        method: the class of the method that is to be trained.
        amp: whether passes run in mixed precision.

    Raises:
        UserError: two of the settings exclude each other.
    """
    if config.meta_engine == "reference":
        behind = config.virtual_gradient == "actual"  # its graph is freed before the meta step
        asked_for = ("--approx-meta", config.approx_meta), ("--lean", config.lean), ("--virtual-gradient actual", behind)
        for flag, asked in asked_for:
            if asked:
                raise UserError(f"{flag} works with the forward engine only: drop it, or drop --meta-engine reference.")
    if config.approx_meta and config.approx_tangent == "difference" and amp:
        raise UserError("--approx-tangent difference needs float32: add --no-amp, or use --approx-tangent forward.")
    schedule = meta_schedule(config, method)
    if method.of_one_batch and schedule != MetaSchedule(1, behind=False):
        flag = "--meta-interval" if schedule.interval > 1 else "--virtual-gradient actual"
        raise UserError(
            f"{flag}: {method.__name__} needs a meta step for each batch and keeps no advisor between them; drop it."
        )


def meta_schedule(config: MetaConfig, method: type[Method]) -> MetaSchedule:
    """Return when ``config`` asks for a meta step, with a method of the class ``method``."""
    approximate = config.approx_meta and not method.of_one_batch
    interval = config.meta_interval or (APPROX_INTERVAL if approximate else 1)
    return MetaSchedule(interval, config.virtual_gradient == "actual" or (config.virtual_gradient == "auto" and approximate))


def build_engine(config: MetaConfig, model: SplitClassifier, image_shape: tuple[int, int], execution: Execution) -> Engine:
    """Build the engine that ``config`` asks for.

    Args:
        config: the meta-gradient's settings.
        model: the classifier, on its device.
        image_shape: (height, width) in pixels of the dummy images on which possible cuts of the model are tried.
        execution: runs forward and backward passes (precision, ranks, random numbers).

    Raises:
        UserError: ``--approx-tangent difference`` is asked for on a device other than the CPU.
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
        raise UserError(
            "--approx-tangent difference needs full float32, but a GPU convolves in TF32: use --approx-tangent forward."
        )
    # Unless told otherwise, a GPU convolves in TF32, whose rounding errors are larger than the finite difference.
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
