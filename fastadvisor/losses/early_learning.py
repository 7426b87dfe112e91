"""Early-learning regularisation (Liu et al. 2020): keep to what the network predicted before it memorised wrong labels."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastadvisor.losses.wide import at_least_float32

CLAMP = 1e-4
"""Probabilities are kept so far from 0 and 1, as in the authors' code, so that the logarithm stays finite."""


def early_learning(z_BC: Tensor, labels: Tensor, targets_BC: Tensor, weight: float = 3.0) -> Tensor:
    """Return CE(z, y) + λ log(1 − ⟨t, p⟩), (B,), with p the softmax of the logits.

    Args:
        z_BC: logits (B, C), of any floating dtype.
        labels: (B,) int64.
        targets_BC: t (B, C), constants: moving averages of the samples' predictions (:func:`updated_targets`).
        weight: λ.
    """
    z_BC = at_least_float32(z_BC)
    agreement_B = (targets_BC.detach() * _probabilities(z_BC)).sum(1)
    return cross_entropy(z_BC, labels, reduction="none") + weight * torch.log(1 - agreement_B)


@torch.no_grad()
def updated_targets(targets_BC: Tensor, z_BC: Tensor, momentum: float = 0.7) -> Tensor:
    """Return β t + (1 − β) p / Σ p, (B, C) in the dtype of ``targets_BC``: the targets after a look at the logits.

    Args:
        targets_BC: t, zeros for samples that have not been seen.
        z_BC: logits (B, C), of any floating dtype.
        momentum: β.
    """
    p_BC = _probabilities(at_least_float32(z_BC))
    return momentum * targets_BC + (1 - momentum) * (p_BC / p_BC.sum(1, keepdim=True)).to(targets_BC.dtype)


def _probabilities(z_BC: Tensor) -> Tensor:
    return torch.softmax(z_BC, 1).clamp(CLAMP, 1 - CLAMP)
