"""The derivative of the equalised softmax cross-entropy along a direction: the inner part of the meta-gradient."""

from fastadvisor_kernels.tangent_loss.operation import tangent_loss

__all__ = ["tangent_loss"]
