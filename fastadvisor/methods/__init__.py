"""All methods by name. To add one, write a file with a subclass of ``Method``, and add a line here."""

from fastadvisor.config import MethodConfig, register_method, select_settings
from fastadvisor.errors import UserError, suggest
from fastadvisor.methods.balanced_softmax import BalancedSoftmax
from fastadvisor.methods.base import Advice, Clock, DataFacts, Method, Seen
from fastadvisor.methods.ce import CrossEntropy
from fastadvisor.methods.crt import CRT
from fastadvisor.methods.elr import ELR
from fastadvisor.methods.finetune import Finetune
from fastadvisor.methods.focal import Focal
from fastadvisor.methods.l2rw import L2RW
from fastadvisor.methods.mes import MES
from fastadvisor.methods.meta_only import MetaOnly
from fastadvisor.methods.mfrw import MFRW
from fastadvisor.methods.mfrw_mes import MFRWMES
from fastadvisor.methods.mw_net import MWNet
from fastadvisor.methods.stages import Stage

METHODS: dict[str, type[Method]] = {
    "ce": CrossEntropy,
    "meta-only": MetaOnly,
    "finetune": Finetune,
    "l2rw": L2RW,
    "mw-net": MWNet,
    "mfrw": MFRW,
    "mes": MES,
    "mfrw-mes": MFRWMES,
    "focal": Focal,
    "balanced-softmax": BalancedSoftmax,
    "elr": ELR,
    "crt": CRT,
}

for _name, _kind in METHODS.items():
    register_method(_name, _kind.Settings)  # from now on every configuration has these settings

__all__ = ["METHODS", "Advice", "Clock", "DataFacts", "Method", "Seen", "Stage", "build_method", "check_method"]


def check_method(name: str) -> None:
    """Raise a UserError that names the most similar method, unless ``name`` is the name of a method."""
    if name not in METHODS:
        raise UserError(f"Unknown method {name!r}.{suggest(name, METHODS)} Methods: {', '.join(METHODS)}.")


def build_method(config: MethodConfig, features: int, facts: DataFacts) -> Method:
    """Build the method ``config.method``.

    Args:
        config: holds the method's name, and its settings by name.
        features: D, the number of features.
        facts: what the method may know of the training set.

    Raises:
        UserError: there is no method of that name.
    """
    check_method(config.method)
    kind = METHODS[config.method]
    return kind(select_settings(kind.Settings, config), features, facts)
