"""What a method is: the loss it puts behind the features, and the meta-parameters that steer it.

Shapes: B samples, D features, C classes; ``f`` features, ``u`` mask and ``v`` equalisation before the sigmoid.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastadvisor.config import MethodConfig
from fastadvisor_kernels import Beta, mes_cross_entropy, reweight_dual, reweight_features, tangent_loss


class Advice(NamedTuple):
    """What the meta-parameters say of a batch; each part is None where the method does without it."""

    mask: Tensor | None = None
    """u (B, D): features become f ⊙ σ(u)."""
    equalisation: Tensor | None = None
    """v (B, C): class k weighs 1 − β σ(v_k) in the softmax."""
    beta: Beta = None
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
    of_one_batch: ClassVar[bool] = False
    """Whether the meta-parameters belong to the batch and are forgotten after it, as L2RW's are."""

    def __init__(self, config: MethodConfig, features: int, classes: int) -> None:
        self.config = config
        self.features = features
        self.classes = classes
        self.advisor: nn.Module | None = None
        self.batch_mean: Callable[[Tensor], Tensor] = Tensor.mean
        """(B,) to the mean over the whole batch, of which there may be other parts elsewhere; differentiable."""

    @property
    def learns(self) -> bool:
        """Whether there are meta-parameters, and so a meta step."""
        return self.advisor is not None

    def meta_parameters(self) -> list[Tensor]:
        """Return θ; valid from :meth:`advise` on."""
        return [] if self.advisor is None else list(self.advisor.parameters())

    def meta_parameter_names(self) -> list[str]:
        """Return what messages call them, in the same order."""
        return [] if self.advisor is None else [name for name, _ in self.advisor.named_parameters()]

    def learn(self, gradients: Sequence[Tensor]) -> None:
        """Meta-Train: take ∇θ Lmeta, given in the order of :meth:`meta_parameters`, for the advisor's optimizer to step by."""
        for parameter, gradient in zip(self.meta_parameters(), gradients, strict=True):
            parameter.grad = gradient

    def phases(self) -> list[Phase]:
        """Return the parts of the run, whose shares sum to 1."""
        return [Phase()]

    def draw(self, rows: int, device: torch.device) -> Beta:
        """Return this iteration's random numbers for ``rows`` samples, shared by Virtual-Train and Actual-Train."""
        return None

    def advise(self, f_BD: Tensor, loss_B: Tensor, labels: Tensor, draw: Beta) -> Advice:
        """Return the advice on a batch, with a graph to the advisor's parameters.

        The inputs are constants, unless ``--advisor-inputs attached``: then a graph to them too.
        """
        return Advice()

    def loss(self, f_BD: Tensor, labels: Tensor, head: nn.Module, advice: Advice) -> Tensor:
        """Return the mean training loss, a scalar (Algorithm 1, Virtual-Train and Actual-Train)."""
        h_BD = f_BD if advice.mask is None else reweight_features(f_BD, advice.mask)
        loss_B = mes_cross_entropy(head(h_BD), advice.equalisation, labels, advice.beta)
        return (loss_B if advice.weight is None else advice.weight * loss_B).mean()

    def tangent_loss(
        self,
        f: "Dual",
        labels: Tensor,
        head: nn.Linear,
        head_tangent: "HeadTangent",
        advice: Advice,
        advice_tangent: Advice | None = None,
    ) -> Tensor:
        """Return L̇, the derivative of :meth:`loss` along a direction (ḟ, head_tangent): a scalar that the advisor's
        parameters reach, so that a first-order backward through it gives the meta-gradient (metagrad/README.md).

        Closed form for the loss above; a subclass with another loss gets a double backward through its few
        operations behind the features, the same value at a higher price. ``advice_tangent``: where the advice moves along
        the direction too, because the advisor's inputs are not constants.
        """
        closed = type(self).loss is Method.loss
        function = closed_tangent if closed else double_backward_tangent
        return function(self, f, labels, head, head_tangent, advice, advice_tangent or Advice())


class Dual(NamedTuple):
    """Features (B, D) and their tangent."""

    primal: Tensor
    tangent: Tensor


class HeadTangent(NamedTuple):
    """The direction in the head's parameters."""

    weight: Tensor
    bias: Tensor | None


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
