"""Balanced softmax (Ren et al. 2020): a softmax that takes into account how frequent each class is in the training set."""

from torch import Tensor
from torch.nn.functional import cross_entropy

from fastadvisor.losses.wide import at_least_float32


def balanced_softmax(z_BC: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Return the cross-entropy of z + log n, (B,), in float32 or wider. At test time the logits z are used unchanged.

    Args:
        z_BC: logits (B, C), of any floating dtype.
        labels: (B,) int64.
        counts: n (C,), the number of training samples of each class; 0 counts as 1.
    """
    z_BC = at_least_float32(z_BC)
    return cross_entropy(z_BC + counts.to(z_BC.dtype).clamp_min(1).log(), labels, reduction="none")
