"""Settings of the methods, and which method uses which.

The settings of one method belong in that method's file, as ``Settings``: :func:`fastadvisor.config.register_method` makes them
settings of every configuration.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from fastadvisor.config.learning import MetaConfig
from fastadvisor.config.metadata import ESSENTIAL, Count, Fraction, NonNegative, Positive
from fastadvisor.config.registry import register_method


@dataclass
class ChoiceConfig:
    """Which method."""

    TITLE: ClassVar = "Method"

    method: Annotated[str, ESSENTIAL] = "mfrw-mes"
    """mfrw, mes, mfrw-mes, mw-net, l2rw, or a floor: ce, meta-only, finetune."""


@dataclass
class AdvisorConfig:
    """The advisor (paper 3.5, 4.2)."""

    advisor_width: Count = 100
    """Size of each embedding of the advisor (paper 4.2)."""
    advisor_lr: Positive | None = None
    """Adam learning rate of the advisor; none: the method's own (advisor networks 1e-4, mw-net 1e-3)."""
    advisor_weight_decay: NonNegative | None = None
    """Adam weight decay of the advisor; none: the method's own (advisor networks 0, mw-net 1e-4)."""


@dataclass
class BetaConfig:
    """The equalised softmax (paper 3.4)."""

    beta_probability: Fraction = 0.9
    """Probability rho that beta is 1 (paper 4.2)."""
    beta_draw: Literal["class", "sample", "batch", "expected"] = "class"
    """What one draw of beta covers; expected: beta is rho itself."""


@dataclass
class WeightConfig:
    """Meta-Weight-Net."""

    weight_normalization: Literal["none", "sum"] = "none"
    """none for label noise (mean of weighted losses), sum for long tails (weights sum to 1)."""


@dataclass
class FinetuneConfig:
    """The second part of a run of finetune."""

    finetune_fraction: Fraction = 0.2
    """Last part of the epochs, spent on the meta-set."""
    finetune_lr_factor: Positive = 0.1
    """Learning rate of that part, over --lr."""


@dataclass
class MethodConfig(FinetuneConfig, WeightConfig, BetaConfig, AdvisorConfig, ChoiceConfig):
    """The method and its advisor."""


register_method("ce")
register_method("meta-only")
register_method("finetune", FinetuneConfig)
register_method("l2rw", MetaConfig)
register_method("mw-net", AdvisorConfig, WeightConfig, MetaConfig)
register_method("mfrw", AdvisorConfig, MetaConfig)
register_method("mes", AdvisorConfig, BetaConfig, MetaConfig)
register_method("mfrw-mes", AdvisorConfig, BetaConfig, MetaConfig)
