"""Logit adjustment (Menon et al. 2021), in the training loss or after training."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastadvisor.losses.wide import at_least_float32


def logit_adjustment(z_BC: Tensor, labels: Tensor, counts: Tensor, tau: float = 1.0) -> Tensor:
    """Return the cross-entropy of z + τ log π, (B,), where π_c = n_c / Σ n; in float32 or wider. τ = 1 gives balanced softmax.

    Args:
        z_BC: logits (B, C), of any floating dtype.
        labels: (B,) int64.
        counts: n (C,), the number of training samples of each class; 0 counts as 1.
        tau: τ, the strength of the adjustment.
    """
    z_BC = at_least_float32(z_BC)
    return cross_entropy(z_BC + tau * _log_frequencies(counts, z_BC.dtype), labels, reduction="none")


def post_hoc(z_BC: Tensor, counts: Tensor, tau: float = 1.0) -> Tensor:
    """Return z − τ log π, (B, C), in float32 or wider: test-time logits for a classifier trained with plain cross-entropy.

    Arguments as for :func:`logit_adjustment`.
    """
    z_BC = at_least_float32(z_BC)
    return z_BC - tau * _log_frequencies(counts, z_BC.dtype)


def _log_frequencies(counts: Tensor, dtype: torch.dtype) -> Tensor:
    counts = counts.to(dtype).clamp_min(1)
    return (counts / counts.sum()).log()
