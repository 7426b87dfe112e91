"""Operations of advisor networks, usable alone: torch is all they need, and Triton makes them fast on a GPU.

One folder per operation: README.md (derivation), reference.py (plain torch: the specification and the oracle), triton.py.
"""

from fastadvisor_kernels.bernoulli import Bernoulli
from fastadvisor_kernels.dispatch import backend
from fastadvisor_kernels.equalization_softmax import Beta, mes_cross_entropy, mes_cross_entropy_with_gradients
from fastadvisor_kernels.feature_reweighting import reweight_dual, reweight_features
from fastadvisor_kernels.tangent_loss import tangent_loss

__all__ = [
    "Bernoulli",
    "Beta",
    "backend",
    "mes_cross_entropy",
    "mes_cross_entropy_with_gradients",
    "reweight_dual",
    "reweight_features",
    "tangent_loss",
]
