"""Meta Feature Re-Weighting in plain torch."""

import torch
from torch import Tensor

from fastadvisor_kernels.launch import compute_dtype


def reweight_features(f_BD: Tensor, u_BD: Tensor) -> Tensor:
    """The specification of :func:`fastadvisor_kernels.reweight_features`: f ⊙ σ(u), on any device."""
    check_shapes(f_BD, u_BD)
    dtype = compute_dtype(f_BD, u_BD)
    return (f_BD.to(dtype) * torch.sigmoid(u_BD.to(dtype))).to(f_BD.dtype)


def reweight_dual(f_BD: Tensor, f_dot_BD: Tensor, u_BD: Tensor) -> tuple[Tensor, Tensor]:
    """The specification of :func:`fastadvisor_kernels.reweight_dual`: f ⊙ σ(u) and ḟ ⊙ σ(u), on any device."""
    check_shapes(f_BD, f_dot_BD, u_BD)
    dtype = compute_dtype(f_BD, f_dot_BD, u_BD)
    mask_BD = torch.sigmoid(u_BD.to(dtype))
    return mask_BD * f_BD.to(dtype), mask_BD * f_dot_BD.to(dtype)


def check_shapes(f_BD: Tensor, *others: Tensor) -> None:
    """Raise a ValueError unless all tensors have the same shape."""
    if any(other.shape != f_BD.shape for other in others):
        raise ValueError(f"Expected f and u of one shape, got {' and '.join(str(tuple(t.shape)) for t in (f_BD, *others))}.")


def gradients(
    grad: Tensor, grad_dot: Tensor | None, f_BD: Tensor, f_dot_BD: Tensor | None, u_BD: Tensor, *, masked: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the gradients of f, ḟ and u in their dtypes, in closed form (README.md); ``masked``: ``f_BD`` is f ⊙ σ(u).

    Differentiable themselves.
    """
    dtype = compute_dtype(f_BD, f_dot_BD, u_BD)
    u, grad = u_BD.to(dtype), grad.to(dtype)
    mask = torch.sigmoid(u)
    pull = grad * f_BD.to(dtype)
    f_dot_grad = None
    if f_dot_BD is not None and grad_dot is not None:
        pull = pull + grad_dot.to(dtype) * f_dot_BD.to(dtype)
        f_dot_grad = (mask * grad_dot.to(dtype)).to(f_dot_BD.dtype)
    slope = torch.sigmoid(-u) if masked else mask * torch.sigmoid(-u)
    return (mask * grad).to(f_BD.dtype), f_dot_grad, (slope * pull).to(u_BD.dtype)
