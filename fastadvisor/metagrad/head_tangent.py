"""The derivative of a method's training loss along a direction, behind the features: what the forward-mode pass hands over to.

Shapes: B samples, D features, C classes; ``f`` features, ``u`` mask and ``v`` equalisation before the sigmoid.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastadvisor.methods.base import Advice, Method
from fastadvisor_kernels import mes_cross_entropy, reweight_dual, tangent_loss


class Dual(NamedTuple):
    """Features (B, D) and their tangent."""

    primal: Tensor
    tangent: Tensor


class HeadTangent(NamedTuple):
    """The direction in the head's parameters."""

    weight: Tensor
    bias: Tensor | None


def training_loss_tangent(
    method: Method,
    f: Dual,
    labels: Tensor,
    head: nn.Linear,
    head_tangent: HeadTangent,
    advice: Advice,
    advice_tangent: Advice | None = None,
) -> Tensor:
    """Return L̇, the derivative of ``method.loss`` along a direction (ḟ, head_tangent): a scalar that the advisor's
    parameters reach, so that a first-order backward through it gives the meta-gradient (README.md here).

    Closed form for the loss of :class:`Method`; a subclass with another loss gets a double backward through its few
    operations behind the features, the same value at a higher price. ``advice_tangent``: where the advice moves along
    the direction too, because the advisor's inputs are not constants.
    """
    closed = type(method).loss is Method.loss
    function = closed_tangent if closed else double_backward_tangent
    return function(method, f, labels, head, head_tangent, advice, advice_tangent or Advice())


def closed_tangent(
    method: Method,
    f: Dual,
    labels: Tensor,
    head: nn.Linear,
    head_tangent: HeadTangent,
    advice: Advice,
    advice_tangent: Advice,
) -> Tensor:
    """L̇ = mean_i ( w_i (Σ_k p̃_k (ż_k + ȧ_k) − ż_y) + ẇ_i ℓ_i ), ż = W ḣ + Ẇ h + ḃ, ȧ_k = ∂a_k/∂v_k v̇_k; in the dtype of
    the head's parameters. ȧ and ẇ only where the advice moves.
    """
    dtype = head.weight.dtype
    if advice.mask is None:
        h, h_dot = f.primal.to(dtype), f.tangent.to(dtype)
    else:
        h, h_dot = reweight_dual(f.primal, f.tangent, advice.mask)
        if advice_tangent.mask is not None:
            mask = torch.sigmoid(advice.mask)
            h_dot = h_dot + mask * (1 - mask) * advice_tangent.mask * f.primal.to(dtype)
    z, z_dot = _logits(head, h, h_dot, head_tangent)
    loss_dot = tangent_loss(z, z_dot, advice.equalisation, labels, advice.beta, advice_tangent.equalisation)
    if advice.weight is None:
        return loss_dot.mean()
    loss_dot = advice.weight * loss_dot
    if advice_tangent.weight is not None:
        loss_dot = loss_dot + advice_tangent.weight * mes_cross_entropy(z, advice.equalisation, labels, advice.beta)
    return loss_dot.mean()


def loss_tangent(f: Dual, labels: Tensor, head: nn.Linear, head_tangent: HeadTangent) -> Tensor:
    """Return the tangent of the plain cross-entropy per sample (B,): Σ_k p_k ż_k − ż_y."""
    dtype = head.weight.dtype
    z, z_dot = _logits(head, f.primal.to(dtype), f.tangent.to(dtype), head_tangent)
    return tangent_loss(z, z_dot, None, labels)


def _logits(head: nn.Linear, h: Tensor, h_dot: Tensor, head_tangent: HeadTangent) -> Dual:
    weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
    return Dual(linear(h, weight, bias), linear(h_dot, weight, head_tangent.bias) + linear(h, head_tangent.weight))


def double_backward_tangent(
    method: Method,
    f: Dual,
    labels: Tensor,
    head: nn.Linear,
    head_tangent: HeadTangent,
    advice: Advice,
    advice_tangent: Advice,
) -> Tensor:
    """L̇ = Σ ⟨∇_x L, ẋ⟩ over features, head and, where it moves, advice; differentiable, for any loss behind the features."""
    leaf = f.primal.detach().requires_grad_()
    inputs, directions = [leaf], [f.tangent]
    moved = (advice_tangent.mask, advice_tangent.equalisation, advice_tangent.weight)
    for value, direction in (
        (head.weight, head_tangent.weight),
        (head.bias, head_tangent.bias),
        *zip((advice.mask, advice.equalisation, advice.weight), moved, strict=True),
    ):
        if value is not None and direction is not None:
            inputs.append(value)
            directions.append(direction)
    gradients = torch.autograd.grad(method.loss(leaf, labels, head, advice), inputs, create_graph=True)
    return torch.stack([(g * d).sum() for g, d in zip(gradients, directions, strict=True)]).sum()
