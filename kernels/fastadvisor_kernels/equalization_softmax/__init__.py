"""Softmax cross-entropy with a weight per sample and class inside the denominator (MES)."""

from fastadvisor_kernels.equalization_softmax.reference import log_weights, mes_cross_entropy

__all__ = ["log_weights", "mes_cross_entropy"]
