"""Logit adjustment (Menon et al. 2021), in training or after it."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastadvisor.losses.wide import at_least_float32


def logit_adjustment(z_BC: Tensor, labels: Tensor, counts: Tensor, tau: float = 1.0) -> Tensor:
    """Return the cross-entropy of z + τ log π, (B,), with the class frequencies π_c = n_c / Σ n. τ = 1 is balanced softmax.

    Args:
        z_BC: logits (B, C), of any floating dtype.
        labels: (B,) int64.
        counts: (C,) training samples of each class, n_c; a class without any counts as one with one.
        tau: τ.
    """
    z_BC = at_least_float32(z_BC)
    return cross_entropy(z_BC + tau * _log_frequencies(counts, z_BC.dtype), labels, reduction="none")


def post_hoc(z_BC: Tensor, counts: Tensor, tau: float = 1.0) -> Tensor:
    """Return z − τ log π, (B, C): what to test a classifier by that was trained with plain cross-entropy."""
    z_BC = at_least_float32(z_BC)
    return z_BC - tau * _log_frequencies(counts, z_BC.dtype)


def _log_frequencies(counts: Tensor, dtype: torch.dtype) -> Tensor:
    counts = counts.to(dtype).clamp_min(1)
    return (counts / counts.sum()).log()
