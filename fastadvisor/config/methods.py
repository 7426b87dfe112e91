"""Which method, and the settings that many methods share.

Those of one method are in that method's file, as ``Settings``: :func:`fastadvisor.config.register_method` makes them settings
of every configuration.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from fastadvisor.config.learning import MetaConfig
from fastadvisor.config.metadata import ESSENTIAL, Count, NonNegative, Positive


@dataclass
class ChoiceConfig:
    """Which method."""

    TITLE: ClassVar = "Method"

    method: Annotated[str, ESSENTIAL] = "mfrw-mes"
    """Learned from the meta-set: mfrw-mes, mfrw, mes, mw-net, l2rw. Fixed losses: focal, balanced-softmax, elr. Two stages:
    crt. Baselines: ce, meta-only, finetune. --help-all lists the settings of each."""


@dataclass
class AdvisorConfig:
    """The advisor (paper 3.5, 4.2)."""

    TITLE: ClassVar = "Advisor"
    USES: ClassVar[tuple[type, ...]] = (MetaConfig,)

    advisor_width: Count = 100
    """Size of each embedding of the advisor (paper 4.2)."""
    advisor_lr: Positive | None = None
    """Adam learning rate of the advisor; none: the method's own (advisor networks 1e-4, mw-net 1e-3)."""
    advisor_weight_decay: NonNegative | None = None
    """Adam weight decay of the advisor; none: the method's own (advisor networks 0, mw-net 1e-4)."""


@dataclass
class MethodConfig(AdvisorConfig, ChoiceConfig):
    """The method and its advisor."""
