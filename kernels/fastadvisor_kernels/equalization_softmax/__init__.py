"""Softmax cross-entropy with a weight per sample and class inside the denominator (MES)."""

from fastadvisor_kernels.equalization_softmax.operation import mes_cross_entropy, mes_cross_entropy_with_gradients
from fastadvisor_kernels.equalization_softmax.reference import Beta, Reduction, log_weights

__all__ = ["Beta", "Reduction", "log_weights", "mes_cross_entropy", "mes_cross_entropy_with_gradients"]
