"""Meta Equalization Softmax in plain torch. Shapes: B samples, C classes."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fastadvisor_kernels.bernoulli import Bernoulli

Beta = None | float | Tensor | Bernoulli
Reduction = Literal["none", "mean", "sum"]


def is_binary(beta: Beta, dtype: torch.dtype) -> bool:
    """Return whether β is 0 or 1 everywhere; a float that is as good as 1 counts: log1p(−β σ(v)) would be −inf for large v.

    Raises:
        ValueError: a float outside [0, 1].
    """
    if beta is None or isinstance(beta, Tensor | Bernoulli):
        return True
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must lie in [0, 1], got {beta}.")
    return 1.0 - beta < torch.finfo(dtype).eps


def log_weights(v_BC: Tensor, y_B: Tensor, beta: Beta = None) -> Tensor:
    """Return a = log w with w_k = 1 − β σ(v_k) for k ≠ y and w_y = 1 (paper eq. 8).

    Works from v, never from s = σ(v): once s rounds to 1, log(1 − s) is −inf, while −softplus(v) stays finite.

    Args:
        v_BC: (B, C) the advisor's output before the sigmoid, any float dtype.
        y_B: (B,) int64 targets.
        beta: None for 1; a float in [0, 1], taken as an expected value; a {0, 1} tensor, (1, 1), (B, 1) or (B, C); or a
            :class:`Bernoulli` that draws one per sample and class.

    Returns:
        (B, C) in the dtype of ``v_BC``.

    Raises:
        ValueError: a float ``beta`` outside [0, 1], or a tensor of another shape.
    """
    check_beta(beta, v_BC)
    if not is_binary(beta, v_BC.dtype):
        a_BC = torch.log1p(-beta * torch.sigmoid(v_BC))  # type: ignore[operator]
    elif isinstance(beta, Tensor | Bernoulli):
        a_BC = torch.where(_mask(beta, v_BC), -softplus(v_BC), 0.0)
    else:
        a_BC = -softplus(v_BC)
    return a_BC.scatter(1, y_B[:, None], 0.0)


def log_weight_slopes(v_BC: Tensor, y_B: Tensor, beta: Beta = None) -> Tensor:
    """Return ∂a_k/∂v_k of :func:`log_weights` (B, C): −β σ(v), for a fractional β −β σ(v) σ(−v) / (1 − β σ(v)), and 0 at y."""
    s_BC = torch.sigmoid(v_BC)
    if not is_binary(beta, v_BC.dtype):
        slope_BC = -beta * s_BC * torch.sigmoid(-v_BC) / (1 - beta * s_BC)  # type: ignore[operator]
    elif isinstance(beta, Tensor | Bernoulli):
        slope_BC = torch.where(_mask(beta, v_BC), -s_BC, 0.0)
    else:
        slope_BC = -s_BC
    return slope_BC.scatter(1, y_B[:, None], 0.0)


def mes_cross_entropy(
    z_BC: Tensor,
    v_BC: Tensor | None,
    y_B: Tensor,
    beta: Beta = None,
    *,
    reduction: Reduction = "none",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The specification of :func:`fastadvisor_kernels.mes_cross_entropy`: same arguments, same result, on any device."""
    check_inputs(z_BC, v_BC, y_B)
    counted_B, safe_B = split_ignored(y_B, ignore_index)
    target_B = smoothed_target(z_BC.to(torch.promote_types(z_BC.dtype, torch.float32)), safe_B, label_smoothing)
    lse_B = torch.logsumexp(weighted_logits(z_BC, v_BC, safe_B, beta), dim=1)
    return reduce(lse_B - target_B, counted_B, reduction)


def gradients(
    grad: Tensor,
    z_BC: Tensor,
    v_BC: Tensor | None,
    y_B: Tensor,
    beta: Beta = None,
    reduction: Reduction = "none",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of z and v in their dtypes for the gradient ``grad`` of the loss, in closed form (README.md).

    Differentiable themselves, in ``grad``, z and v.
    """
    counted_B, safe_B = split_ignored(y_B, ignore_index)
    p_BC = torch.softmax(weighted_logits(z_BC, v_BC, safe_B, beta), dim=1)
    return _gradients(grad_of_each(grad, counted_B, reduction), p_BC, z_BC, v_BC, safe_B, beta, label_smoothing)


def loss_and_gradients(
    z_BC: Tensor,
    v_BC: Tensor | None,
    y_B: Tensor,
    grad_B: Tensor | None,
    beta: Beta = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the losses (B,) and the gradients of z and v, the weights computed once."""
    counted_B, safe_B = split_ignored(y_B, ignore_index)
    x_BC = weighted_logits(z_BC, v_BC, safe_B, beta)
    lse_B = torch.logsumexp(x_BC, dim=1)
    target_B = smoothed_target(z_BC.to(torch.promote_types(z_BC.dtype, torch.float32)), safe_B, label_smoothing)
    loss_B = reduce(lse_B - target_B, counted_B, "none")
    grad_B = grad_of_each(torch.ones_like(loss_B) if grad_B is None else grad_B, counted_B, "none")
    p_BC = torch.exp(x_BC - lse_B[:, None])
    return loss_B, *_gradients(grad_B, p_BC, z_BC, v_BC, safe_B, beta, label_smoothing)


def _gradients(
    grad_B: Tensor, p_BC: Tensor, z_BC: Tensor, v_BC: Tensor | None, y_B: Tensor, beta: Beta, label_smoothing: float
) -> tuple[Tensor, Tensor | None]:
    grad_B1 = grad_B[:, None]
    z_grad = (grad_B1 * (p_BC - smoothed_one_hot(p_BC, y_B, label_smoothing))).to(z_BC.dtype)
    if v_BC is None:
        return z_grad, None
    slope_BC = log_weight_slopes(v_BC.to(torch.promote_types(v_BC.dtype, torch.float32)), y_B, beta)
    return z_grad, (grad_B1 * p_BC * slope_BC).to(v_BC.dtype)


def weighted_logits(z_BC: Tensor, v_BC: Tensor | None, y_B: Tensor, beta: Beta) -> Tensor:
    """Return z + a (B, C) in float32 at least."""
    z_BC = z_BC.to(torch.promote_types(z_BC.dtype, torch.float32))
    if v_BC is None:
        return z_BC
    return z_BC + log_weights(v_BC.to(torch.promote_types(v_BC.dtype, torch.float32)), y_B, beta)


def split_ignored(y_B: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return which samples count (B,) bool, and the targets (B,) int64, with 0 for those that are ignored."""
    counted_B = y_B != ignore_index
    return counted_B, torch.where(counted_B, y_B, 0).long()


def smoothed_target(z_BC: Tensor, y_B: Tensor, label_smoothing: float) -> Tensor:
    """Return Σ_k t_k z_k (B,) for the targets t = (1 − ε) [k = y] + ε / C."""
    target_B = z_BC.gather(1, y_B[:, None]).squeeze(1)
    return target_B if label_smoothing == 0 else torch.lerp(target_B, z_BC.mean(dim=1), label_smoothing)


def smoothed_one_hot(like_BC: Tensor, y_B: Tensor, label_smoothing: float) -> Tensor:
    """Return t = (1 − ε) [k = y] + ε / C (B, C)."""
    zeros_BC = torch.zeros_like(like_BC)
    return zeros_BC.scatter(1, y_B[:, None], 1.0 - label_smoothing) + label_smoothing / like_BC.shape[1]


def reduce(loss_B: Tensor, counted_B: Tensor, reduction: Reduction) -> Tensor:
    """Return the losses, 0 where not counted; or their sum; or their mean over those that are counted (NaN if none is)."""
    loss_B = torch.where(counted_B, loss_B, 0.0)
    if reduction == "none":
        return loss_B
    return loss_B.sum() if reduction == "sum" else loss_B.sum() / counted_B.sum()


def grad_of_each(grad: Tensor, counted_B: Tensor, reduction: Reduction) -> Tensor:
    """Return the gradient of each loss (B,) from that of the reduced one."""
    return torch.where(counted_B, grad / counted_B.sum() if reduction == "mean" else grad, 0.0)


def check_options(reduction: str, label_smoothing: float) -> None:
    """Raise a ValueError for an unknown ``reduction`` or a ``label_smoothing`` outside [0, 1]."""
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be none, mean or sum, got {reduction!r}.")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}.")


def check_inputs(z_BC: Tensor, v_BC: Tensor | None, y_B: Tensor) -> None:
    """Raise a ValueError unless the shapes are (B, C), (B, C) and (B,)."""
    if z_BC.dim() != 2 or y_B.shape != z_BC.shape[:1] or (v_BC is not None and v_BC.shape != z_BC.shape):
        shapes = [tuple(t.shape) for t in (z_BC, v_BC, y_B) if t is not None]
        raise ValueError(f"Expected z (B, C), v (B, C) and y (B,), got {shapes}.")


def check_beta(beta: Beta, v_BC: Tensor) -> None:
    """Raise a ValueError for a ``beta`` whose shape does not fit v (B, C), or a float outside [0, 1]."""
    if isinstance(beta, Tensor) and beta.shape not in ((1, 1), (len(v_BC), 1), v_BC.shape):
        raise ValueError(f"beta must be (1, 1), (B, 1) or (B, C) for (B, C) = {tuple(v_BC.shape)}, got {tuple(beta.shape)}.")
    is_binary(beta, v_BC.dtype)


def _mask(beta: Tensor | Bernoulli, v_BC: Tensor) -> Tensor:
    return beta.mask(*v_BC.shape) if isinstance(beta, Bernoulli) else beta != 0
