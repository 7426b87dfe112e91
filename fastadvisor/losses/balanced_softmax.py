"""Balanced softmax (Ren et al. 2020): the softmax of a training set in which classes are unequally frequent."""

from torch import Tensor
from torch.nn.functional import cross_entropy

from fastadvisor.losses.wide import at_least_float32


def balanced_softmax(z_BC: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Return the cross-entropy of z + log n, (B,). Tested are the logits z as they are.

    Args:
        z_BC: logits (B, C), of any floating dtype.
        labels: (B,) int64.
        counts: (C,) training samples of each class, n_c; a class without any counts as one with one.
    """
    z_BC = at_least_float32(z_BC)
    return cross_entropy(z_BC + counts.to(z_BC.dtype).clamp_min(1).log(), labels, reduction="none")
