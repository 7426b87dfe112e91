"""What a method is: the loss it puts behind the features, and the meta-parameters that steer it.

Shapes: B samples, D features, C classes; ``f`` features, ``u`` mask and ``v`` equalisation before the sigmoid.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastadvisor.config import MethodConfig
from fastadvisor_kernels import mes_cross_entropy, reweight_features
from fastadvisor_kernels.equalization_softmax import log_weights


class Advice(NamedTuple):
    """What the meta-parameters say of a batch; each part is None where the method does without it."""

    mask: Tensor | None = None
    """u (B, D): features become f ⊙ σ(u)."""
    equalisation: Tensor | None = None
    """v (B, C): class k weighs 1 − β σ(v_k) in the softmax."""
    beta: float | Tensor | None = None
    """As in ``mes_cross_entropy``."""
    weight: Tensor | None = None
    """(B,) factor of each sample's loss."""

    def detach(self) -> "Advice":
        """Return the same advice as constants."""
        mask, equalisation, weight = (
            None if part is None else part.detach() for part in (self.mask, self.equalisation, self.weight)
        )
        return Advice(mask, equalisation, self.beta, weight)


@dataclass
class Phase:
    """A part of the run: which images it trains on, for what share of the epochs, at what rate."""

    source: Literal["train", "meta"] = "train"
    share: float = 1.0
    lr_factor: float = 1.0


class Method:
    """Plain cross-entropy, and the frame of every other method.

    A method with meta-parameters builds an ``advisor`` and overrides :meth:`advise`. One whose loss is not
    :meth:`loss` overrides that too; its meta-gradient stays exact (see :meth:`tangent_loss`).

    Args:
        config: the method's settings.
        features: D.
        classes: C.
    """

    advisor_lr: ClassVar[float] = 1e-4
    """Adam's rate where the user gives none (paper 4.2)."""
    advisor_weight_decay: ClassVar[float] = 0.0

    def __init__(self, config: MethodConfig, features: int, classes: int) -> None:
        self.config = config
        self.features = features
        self.classes = classes
        self.advisor: nn.Module | None = None

    def phases(self) -> list[Phase]:
        """Return the parts of the run, whose shares sum to 1."""
        return [Phase()]

    def draw(self, labels: Tensor) -> float | Tensor | None:
        """Return this iteration's random numbers, shared by Virtual-Train and Actual-Train."""
        return None

    def advise(self, f_BD: Tensor, loss_B: Tensor, labels: Tensor, draw: float | Tensor | None) -> Advice:
        """Return the advice on a batch, with a graph to the advisor's parameters; all inputs are constants."""
        return Advice()

    def loss(self, f_BD: Tensor, labels: Tensor, head: nn.Module, advice: Advice) -> Tensor:
        """Return the mean training loss, a scalar (Algorithm 1, Virtual-Train and Actual-Train)."""
        h_BD = f_BD if advice.mask is None else reweight_features(f_BD, advice.mask)
        loss_B = mes_cross_entropy(head(h_BD), advice.equalisation, labels, advice.beta)
        return (loss_B if advice.weight is None else advice.weight * loss_B).mean()

    def tangent_loss(self, f: "Dual", labels: Tensor, head: nn.Linear, head_tangent: "HeadTangent", advice: Advice) -> Tensor:
        """Return L̇, the derivative of :meth:`loss` along a direction (ḟ, head_tangent): a scalar that the advisor's
        parameters reach, so that a first-order backward through it gives the meta-gradient (metagrad/README.md).

        Closed form for the loss above; a subclass with another loss gets a double backward through its few
        operations behind the features, the same value at a higher price.
        """
        closed = type(self).loss is Method.loss
        return (closed_tangent if closed else double_backward_tangent)(self, f, labels, head, head_tangent, advice)


class Dual(NamedTuple):
    """Features (B, D) and their tangent."""

    primal: Tensor
    tangent: Tensor


class HeadTangent(NamedTuple):
    """The direction in the head's parameters."""

    weight: Tensor
    bias: Tensor | None


def closed_tangent(
    method: Method, f: Dual, labels: Tensor, head: nn.Linear, head_tangent: HeadTangent, advice: Advice
) -> Tensor:
    """L̇ = mean_i w_i (Σ_k p̃_k ż_k − ż_y), ż = W ḣ + Ẇ h + ḃ, in the dtype of the head's parameters."""
    dtype = head.weight.dtype
    h, h_dot = f.primal.to(dtype), f.tangent.to(dtype)
    if advice.mask is not None:
        mask = torch.sigmoid(advice.mask)
        h, h_dot = mask * h, mask * h_dot
    bias = None if head.bias is None else head.bias.detach()
    z = linear(h, head.weight.detach(), bias)
    z_dot = linear(h_dot, head.weight.detach(), head_tangent.bias) + linear(h, head_tangent.weight)
    if advice.equalisation is not None:
        z = z + log_weights(advice.equalisation, labels, advice.beta)
    p = torch.softmax(z, dim=1)
    loss_dot = (p * z_dot).sum(dim=1) - z_dot.gather(1, labels[:, None]).squeeze(1)
    return (loss_dot if advice.weight is None else advice.weight * loss_dot).mean()


def double_backward_tangent(
    method: Method, f: Dual, labels: Tensor, head: nn.Linear, head_tangent: HeadTangent, advice: Advice
) -> Tensor:
    """L̇ = ⟨∇_f L, ḟ⟩ + ⟨∇_head L, head_tangent⟩, differentiable: for any loss behind the features."""
    leaf = f.primal.detach().requires_grad_()
    parameters = [parameter for parameter in (head.weight, head.bias) if parameter is not None]
    gradients = torch.autograd.grad(method.loss(leaf, labels, head, advice), [leaf, *parameters], create_graph=True)
    directions = [f.tangent, *(tangent for tangent in head_tangent if tangent is not None)]
    return torch.stack([(g * d).sum() for g, d in zip(gradients, directions, strict=True)]).sum()
