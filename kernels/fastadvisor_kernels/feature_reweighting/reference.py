"""Meta Feature Re-Weighting in plain torch."""

import torch
from torch import Tensor


def reweight_features(f_BD: Tensor, u_BD: Tensor) -> Tensor:
    """Return f ⊙ σ(u): features masked by the advisor (paper eq. 3).

    Args:
        f_BD: (..., D) features, any float dtype.
        u_BD: (..., D) the advisor's output before the sigmoid, any float dtype.

    Returns:
        (..., D) in the dtype of ``f_BD``; the product is taken in float32 at least.

    Raises:
        ValueError: shapes that differ.
    """
    if f_BD.shape != u_BD.shape:
        raise ValueError(f"Expected f and u of one shape, got {tuple(f_BD.shape)} and {tuple(u_BD.shape)}.")
    dtype = torch.promote_types(f_BD.dtype, torch.float32)
    return (f_BD.to(dtype) * torch.sigmoid(u_BD.to(dtype))).to(f_BD.dtype)
