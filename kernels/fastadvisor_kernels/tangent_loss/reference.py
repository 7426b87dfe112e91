"""The directional derivative of the equalised softmax cross-entropy in plain torch. Shapes: B samples, C classes."""

import torch
from torch import Tensor

from fastadvisor_kernels.equalization_softmax.reference import (
    Beta,
    Reduction,
    check_inputs,
    grad_of_each,
    is_binary,
    log_weight_slopes,
    log_weights,
    reduce,
    smoothed_one_hot,
    smoothed_target,
    split_ignored,
    weighted_logits,
)


def tangent_loss(
    z_BC: Tensor,
    z_dot_BC: Tensor,
    v_BC: Tensor | None,
    y_B: Tensor,
    beta: Beta = None,
    v_dot_BC: Tensor | None = None,
    *,
    reduction: Reduction = "none",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The specification of :func:`fastadvisor_kernels.tangent_loss`: same arguments, same result, on any device."""
    check_tangent_inputs(z_BC, z_dot_BC, v_BC, y_B, v_dot_BC)
    dtype = torch.promote_types(torch.promote_types(z_BC.dtype, z_dot_BC.dtype), torch.float32)
    z_BC, z_dot_BC = z_BC.to(dtype), z_dot_BC.to(dtype)
    counted_B, y_B = split_ignored(y_B, ignore_index)
    target_dot_B = smoothed_target(z_dot_BC, y_B, label_smoothing)
    if v_BC is not None:
        v_BC = v_BC.to(torch.promote_types(v_BC.dtype, torch.float32))
        z_BC = z_BC + log_weights(v_BC, y_B, beta)
        if v_dot_BC is not None:
            z_dot_BC = z_dot_BC + log_weight_slopes(v_BC, y_B, beta) * v_dot_BC
    return reduce((torch.softmax(z_BC, dim=1) * z_dot_BC).sum(dim=1) - target_dot_B, counted_B, reduction)


def check_tangent_inputs(z_BC: Tensor, z_dot_BC: Tensor, v_BC: Tensor | None, y_B: Tensor, v_dot_BC: Tensor | None) -> None:
    """Raise a ValueError unless all shapes are those of z (B, C) and y (B,), and v̇ comes with v."""
    check_inputs(z_BC, v_BC, y_B)
    for name, part in (("ż", z_dot_BC), ("v̇", v_dot_BC)):
        if part is not None and part.shape != z_BC.shape:
            raise ValueError(f"Expected {name} (B, C) = {tuple(z_BC.shape)}, got {tuple(part.shape)}.")
    if v_dot_BC is not None and v_BC is None:
        raise ValueError("v̇ is a tangent of v: give v too.")


def gradients(
    grad: Tensor,
    z_BC: Tensor,
    z_dot_BC: Tensor,
    v_BC: Tensor | None,
    v_dot_BC: Tensor | None,
    y_B: Tensor,
    beta: Beta = None,
    reduction: Reduction = "none",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of z, ż, v and v̇ in their dtypes for the gradient ``grad`` of L̇, in closed form (README.md).

    Differentiable themselves, in all five.
    """
    dtype = torch.promote_types(torch.promote_types(z_BC.dtype, z_dot_BC.dtype), torch.float32)
    counted_B, safe_B = split_ignored(y_B, ignore_index)
    grad_B1 = grad_of_each(grad, counted_B, reduction)[:, None]
    p_BC = torch.softmax(weighted_logits(z_BC.to(dtype), v_BC, safe_B, beta), dim=1)
    q_BC = z_dot_BC.to(dtype)
    v_grad = v_dot_grad = None
    if v_BC is not None:
        v = v_BC.to(torch.promote_types(v_BC.dtype, torch.float32))
        slope_BC = log_weight_slopes(v, safe_B, beta)
        if v_dot_BC is not None:
            q_BC = q_BC + slope_BC * v_dot_BC
            v_dot_grad = (grad_B1 * p_BC * slope_BC).to(v_dot_BC.dtype)
    pull_BC = grad_B1 * p_BC * (q_BC - (p_BC * q_BC).sum(dim=1, keepdim=True))
    if v_BC is not None:
        v_grad_BC = slope_BC * pull_BC
        if v_dot_BC is not None:
            # a_k is a function of v_k alone: its second derivative is that of the slope.
            s_BC = torch.sigmoid(v)
            curvature_BC = slope_BC * torch.sigmoid(-v)
            if not is_binary(beta, v.dtype):
                curvature_BC = curvature_BC - slope_BC * (s_BC + slope_BC)
            v_grad_BC = v_grad_BC + grad_B1 * p_BC * curvature_BC * v_dot_BC
        v_grad = v_grad_BC.to(v_BC.dtype)
    z_dot_grad = grad_B1 * (p_BC - smoothed_one_hot(p_BC, safe_B, label_smoothing))
    return pull_BC.to(z_BC.dtype), z_dot_grad.to(z_dot_BC.dtype), v_grad, v_dot_grad
