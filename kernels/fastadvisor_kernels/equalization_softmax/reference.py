"""Meta Equalization Softmax in plain torch. Shapes: B samples, C classes."""

import torch
from torch import Tensor
from torch.nn.functional import softplus

Beta = None | float | Tensor


def log_weights(v_BC: Tensor, y_B: Tensor, beta: Beta = None) -> Tensor:
    """Return a = log w with w_k = 1 − β σ(v_k) for k ≠ y and w_y = 1 (paper eq. 8).

    Works from v, never from s = σ(v): once s rounds to 1, log(1 − s) is −inf, while −softplus(v) stays finite.

    Args:
        v_BC: (B, C) the advisor's output before the sigmoid, any float dtype.
        y_B: (B,) int64 targets.
        beta: None for 1; a float in [0, 1], taken as an expected value; or a {0, 1} tensor, (1, 1), (B, 1) or (B, C).

    Returns:
        (B, C) in the dtype of ``v_BC``.

    Raises:
        ValueError: a float ``beta`` outside [0, 1], or a tensor of another shape.
    """
    if isinstance(beta, Tensor) and beta.shape not in ((1, 1), (len(v_BC), 1), v_BC.shape):
        raise ValueError(f"beta must be (1, 1), (B, 1) or (B, C) for (B, C) = {tuple(v_BC.shape)}, got {tuple(beta.shape)}.")
    if beta is None:
        a_BC = -softplus(v_BC)
    elif isinstance(beta, Tensor):
        a_BC = -beta.to(v_BC.dtype) * softplus(v_BC)
    elif not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must lie in [0, 1], got {beta}.")
    elif 1.0 - beta < torch.finfo(v_BC.dtype).eps:  # 1, or as good as: log1p(−β σ(v)) would be −inf for large v
        a_BC = -softplus(v_BC)
    else:
        a_BC = torch.log1p(-beta * torch.sigmoid(v_BC))
    return a_BC.scatter(1, y_B[:, None], 0.0)


def mes_cross_entropy(z_BC: Tensor, v_BC: Tensor | None, y_B: Tensor, beta: Beta = None) -> Tensor:
    """Return the equalised softmax cross-entropy per sample (paper eq. 4, 6, 8): −log(e^{z_y} / Σ_k w_k e^{z_k}).

    Non-negative, and finite for every finite input. Differentiable twice in z and v.

    Args:
        z_BC: (B, C) logits, any float dtype.
        v_BC: (B, C) the advisor's output before the sigmoid; None for plain cross-entropy.
        y_B: (B,) int64 targets in [0, C).
        beta: as in :func:`log_weights`.

    Returns:
        (B,) float32 losses (float64 where an input is float64); gradients come in the dtype of their input.

    Raises:
        ValueError: shapes that do not fit, or a float ``beta`` outside [0, 1].
    """
    if z_BC.dim() != 2 or y_B.shape != z_BC.shape[:1] or (v_BC is not None and v_BC.shape != z_BC.shape):
        shapes = [tuple(t.shape) for t in (z_BC, v_BC, y_B) if t is not None]
        raise ValueError(f"Expected z (B, C), v (B, C) and y (B,), got {shapes}.")
    dtype = torch.promote_types(z_BC.dtype, torch.float32)
    z_BC = z_BC.to(dtype)
    target_B = z_BC.gather(1, y_B[:, None]).squeeze(1)
    if v_BC is not None:
        z_BC = z_BC + log_weights(v_BC.to(torch.promote_types(v_BC.dtype, torch.float32)), y_B, beta)
    return torch.logsumexp(z_BC, dim=1) - target_B
