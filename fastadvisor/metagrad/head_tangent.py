"""The derivative of a method's training loss along a direction, behind the features: the last part of the tangent pass.

Shapes: B samples, D features, C classes; ``f`` features, ``u`` mask and ``v`` equalisation before the sigmoid.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.functional import linear

from fastadvisor.errors import UserError
from fastadvisor.loading.batch import Batch
from fastadvisor.metagrad.tangent import Tangents
from fastadvisor.methods.base import Advice, Method
from fastadvisor.models import is_plain_linear
from fastadvisor_kernels import mes_cross_entropy, reweight_dual, tangent_loss

HeadTangent = Mapping[str, Tensor]
"""The direction in the head's parameters, by their names in the head. Every trainable parameter must have one; frozen ones have
none."""


class Dual(NamedTuple):
    """A primal value and its tangent, of one shape, such as the features f (B, D) and ḟ."""

    primal: Tensor
    tangent: Tensor


def training_loss_tangent(
    method: Method,
    f: Dual,
    batch: Batch,
    head: nn.Linear,
    head_tangent: HeadTangent,
    advice: Advice,
    advice_tangent: Advice | None = None,
) -> Tensor:
    """Return L̇, the derivative of ``method.loss`` along the direction (ḟ, head_tangent).

    L̇ is a scalar with a graph to the advisor's parameters, so one ordinary backward pass from it gives the meta-gradient
    (README.md in this folder). For the loss of :class:`Method` it is a closed form. For a subclass with another loss it is a
    double backward through the few operations behind the features: the same value, but more expensive.

    Args:
        method: the method whose loss it is.
        f: the features (B, D) and their tangent.
        batch: the labels (B,) and ids (B,).
        head: the classifier's head.
        head_tangent: the direction in the head's parameters.
        advice: the advice on the batch, with its graph to the advisor's parameters.
        advice_tangent: the advice's tangent, if it changes along the direction because the advisor's inputs are attached.

    Raises:
        UserError: the head has an operation without a forward-mode derivative.
    """
    kind = type(method)
    closed = kind.loss is Method.loss and kind.sample_losses is Method.sample_losses
    function = closed_form_tangent if closed else double_backward_tangent
    return function(method, f, batch, head, head_tangent, advice, advice_tangent or Advice())


def closed_form_tangent(
    method: Method,
    f: Dual,
    batch: Batch,
    head: nn.Linear,
    head_tangent: HeadTangent,
    advice: Advice,
    advice_tangent: Advice,
) -> Tensor:
    """Return L̇ = mean_i ( w_i (Σ_k p̃_k (ż_k + ȧ_k) − ż_y) + ẇ_i ℓ_i ), in the dtype of the head's parameters.

    Here ż = W ḣ + Ẇ h + ḃ for a plain linear head, and ȧ_k = ∂a_k/∂v_k v̇_k. ȧ and ẇ, the tangents of the equalisation's term
    and of the sample weights, are 0 without ``advice_tangent``. Arguments as for :func:`training_loss_tangent`.
    """
    dtype, labels = next(head.parameters()).dtype, batch.labels
    mask, equalisation, weight = (advice.get(name) for name in ("mask", "equalisation", "weight"))
    mask_dot, equalisation_dot, weight_dot = (advice_tangent.get(name) for name in ("mask", "equalisation", "weight"))
    if mask is None:
        h, h_dot = f.primal.to(dtype), f.tangent.to(dtype)
    else:
        h, h_dot = reweight_dual(f.primal, f.tangent, mask)
        if mask_dot is not None:
            gate = torch.sigmoid(mask)
            h_dot = h_dot + gate * (1 - gate) * mask_dot * f.primal.to(dtype)
    z, z_dot = logits_with_tangent(head, h, h_dot, head_tangent)
    loss_dot = tangent_loss(z, z_dot, equalisation, labels, advice.beta, equalisation_dot)
    if weight is None:
        return loss_dot.mean()
    loss_dot = weight * loss_dot
    if weight_dot is not None:
        loss_dot = loss_dot + weight_dot * mes_cross_entropy(z, equalisation, labels, advice.beta)
    return loss_dot.mean()


def cross_entropy_tangent(f: Dual, labels: Tensor, head: nn.Linear, head_tangent: HeadTangent) -> Tensor:
    """Return the tangent Σ_k p_k ż_k − ż_y of the plain cross-entropy of each sample, (B,)."""
    dtype = next(head.parameters()).dtype
    z, z_dot = logits_with_tangent(head, f.primal.to(dtype), f.tangent.to(dtype), head_tangent)
    return tangent_loss(z, z_dot, None, labels)


def logits_with_tangent(head: nn.Linear, h: Tensor, h_dot: Tensor, head_tangent: HeadTangent) -> Dual:
    """Return z = Φc(h) (B, C) and its tangent ż along (ḣ, head_tangent), both differentiable in h and ḣ.

    For a plain linear layer ż = W ḣ + Ẇ h + ḃ. For any other head (a cosine classifier, one with weight or spectral
    normalisation, one with hooks) ż comes from a forward-mode pass through the head itself.

    Raises:
        UserError: the head has an operation without a forward-mode derivative.
    """
    if is_plain_linear(head):
        weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
        z_dot = linear(h_dot, weight, head_tangent.get("bias"))
        if (of_weight := head_tangent.get("weight")) is not None:
            z_dot = z_dot + linear(h, of_weight)
        return Dual(linear(h, weight, bias), z_dot)
    try:
        with forward_ad.dual_level(), Tangents():
            values = {name: parameter.detach() for name, parameter in head.named_parameters()}
            values |= {name: forward_ad.make_dual(values[name], direction) for name, direction in head_tangent.items()}
            z, z_dot = forward_ad.unpack_dual(functional_call(head, values, (forward_ad.make_dual(h, h_dot),)))
    except NotImplementedError as error:
        raise forward_mode_error(f"The head, {type(head).__name__},", error) from None
    if z_dot is None:
        # An operation registered with torch.library drops tangents without an error.
        raise forward_mode_error(f"The head, {type(head).__name__},")
    return Dual(z, z_dot)


def forward_mode_error(what: str, error: NotImplementedError | None = None) -> UserError:
    """Return the error to raise if ``what`` has an operation without a forward-mode derivative in torch."""
    reason = "" if error is None else f" ({str(error).splitlines()[0][:120]})"
    return UserError(
        f"{what} has an operation without a forward-mode derivative{reason}: take another, or add --meta-engine reference, "
        "which needs none."
    )


def double_backward_tangent(
    method: Method,
    f: Dual,
    batch: Batch,
    head: nn.Linear,
    head_tangent: HeadTangent,
    advice: Advice,
    advice_tangent: Advice,
) -> Tensor:
    """Return L̇ = Σ ⟨∇_x L, ẋ⟩, summed over features, head parameters and, with ``advice_tangent``, advice.

    Right for any loss behind the features; differentiable. Arguments as for :func:`training_loss_tangent`.
    """
    leaf = f.primal.detach().requires_grad_()
    parameters = dict(head.named_parameters())
    inputs = [leaf, *(parameters[name] for name in head_tangent)]
    directions = [f.tangent, *head_tangent.values()]
    for name, direction in advice_tangent.outputs.items():
        inputs.append(advice.outputs[name])
        directions.append(direction)
    gradients = torch.autograd.grad(method.loss(leaf, batch, head, advice), inputs, create_graph=True)
    return torch.stack([(g * d).sum() for g, d in zip(gradients, directions, strict=True)]).sum()
