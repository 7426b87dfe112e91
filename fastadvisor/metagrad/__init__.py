"""The meta-gradient: how the advisor learns from what its advice did to the classifier. Derivation: README.md here."""

from fastadvisor.config import MetaConfig
from fastadvisor.errors import UserError
from fastadvisor.metagrad.base import Engine, MetaGradient, MetaProblem, Plan, Precision, SharedForward, VirtualStep
from fastadvisor.metagrad.forward import ForwardEngine
from fastadvisor.metagrad.reference import ReferenceEngine
from fastadvisor.metagrad.validated import ValidatedEngine
from fastadvisor.models import Cut

__all__ = [
    "Engine",
    "ForwardEngine",
    "MetaGradient",
    "MetaProblem",
    "Plan",
    "Precision",
    "ReferenceEngine",
    "SharedForward",
    "ValidatedEngine",
    "VirtualStep",
    "build_engine",
]


def build_engine(config: MetaConfig, precision: Precision, cut: Cut | None) -> Engine:
    """Return the engine ``config`` asks for; ``cut`` is where an approximate one begins, None for an exact one.

    Raises:
        UserError: an approximation by the reference engine, which is exact by definition.
    """
    if config.meta_engine == "reference":
        if config.approx_meta:
            raise UserError("--meta-engine reference is always exact; drop it, or add --no-approx-meta.")
        return ReferenceEngine(precision)
    if cut is None or not config.validate_meta_every:
        return ForwardEngine(precision, cut)
    return ValidatedEngine(
        ForwardEngine(precision, cut), ForwardEngine(precision), config.validate_meta_every, config.min_meta_cosine
    )
