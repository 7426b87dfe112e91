"""What a method is: the loss it puts behind the features, and the meta-parameters that steer it.

Shapes: B samples, D features, C classes; ``f`` features, ``u`` mask and ``v`` equalisation before the sigmoid.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastadvisor.config import MethodConfig
from fastadvisor_kernels import Beta, mes_cross_entropy, reweight_features


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
    :meth:`loss` overrides that too; its meta-gradient stays exact (metagrad/head_tangent.py).

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

    @classmethod
    def needs_whole_batch(cls, settings: MethodConfig) -> str | None:
        """Return the flag for which the method needs all of a batch at once, and so no --accumulate; None where it does not."""
        return None

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
