"""Sigmoid-masked features (MFRW)."""

from fastadvisor_kernels.feature_reweighting.reference import reweight_features

__all__ = ["reweight_features"]
