"""Early-learning regularisation (Liu et al. 2020): stay close to the predictions from before wrong labels were memorised."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastadvisor.losses.wide import at_least_float32

CLAMP = 1e-4
"""Smallest distance of a probability from 0 and 1, as in the authors' code; it keeps the logarithm finite."""


def early_learning(z_BC: Tensor, labels: Tensor, targets_BC: Tensor, weight: float = 3.0) -> Tensor:
    """Return CE(z, y) + λ log(1 − ⟨t, p⟩), (B,), where p is the softmax of the logits; in float32 or wider.

    Args:
        z_BC: logits (B, C), of any floating dtype.
        labels: (B,) int64.
        targets_BC: t (B, C), moving averages of the samples' predictions (:func:`updated_targets`); treated as constants.
        weight: λ.
    """
    z_BC = at_least_float32(z_BC)
    agreement_B = (targets_BC.detach() * _probabilities(z_BC)).sum(1)
    return cross_entropy(z_BC, labels, reduction="none") + weight * torch.log(1 - agreement_B)


@torch.no_grad()
def updated_targets(targets_BC: Tensor, z_BC: Tensor, momentum: float = 0.7) -> Tensor:
    """Return the updated moving averages β t + (1 − β) p / Σ p, (B, C), in the dtype of ``targets_BC``.

    Args:
        targets_BC: t (B, C); zeros for samples that have not been seen yet.
        z_BC: logits (B, C), of any floating dtype.
        momentum: β.
    """
    p_BC = _probabilities(at_least_float32(z_BC))
    return momentum * targets_BC + (1 - momentum) * (p_BC / p_BC.sum(1, keepdim=True)).to(targets_BC.dtype)


def _probabilities(z_BC: Tensor) -> Tensor:
    return torch.softmax(z_BC, 1).clamp(CLAMP, 1 - CLAMP)
