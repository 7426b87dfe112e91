"""Operations of advisor networks, usable alone: torch is all they need.

One folder per operation: README.md (derivation), reference.py (plain torch: the specification and the oracle).
"""

from fastadvisor_kernels.equalization_softmax import mes_cross_entropy
from fastadvisor_kernels.feature_reweighting import reweight_features

__all__ = ["mes_cross_entropy", "reweight_features"]
