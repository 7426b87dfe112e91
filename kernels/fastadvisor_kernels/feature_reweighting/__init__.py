"""Sigmoid-masked features (MFRW)."""

from fastadvisor_kernels.feature_reweighting.operation import reweight_dual, reweight_features

__all__ = ["reweight_dual", "reweight_features"]
