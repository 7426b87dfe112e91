"""Focal loss (Lin et al. 2017): samples that are already classified well count less."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastadvisor.losses.wide import at_least_float32


def focal(z_BC: Tensor, labels: Tensor, gamma: float = 1.0) -> Tensor:
    """Return (1 − p_y)^γ · (−log p_y), (B,), where p is the softmax of the logits; in float32 or wider.

    Args:
        z_BC: logits (B, C), of any floating dtype.
        labels: (B,) int64.
        gamma: γ ≥ 0; 0 gives plain cross-entropy.
    """
    loss_B = cross_entropy(at_least_float32(z_BC), labels, reduction="none")
    missing_B = -torch.expm1(-loss_B)  # 1 − p_y, exact where p_y is nearly 1
    # For γ < 1 the power has an infinite slope at 0.
    return missing_B.clamp_min(torch.finfo(missing_B.dtype).tiny) ** gamma * loss_B
