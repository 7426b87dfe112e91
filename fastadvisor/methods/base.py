"""What a method is: the loss it puts behind the features, and the meta-parameters that steer it.

Shapes: B samples, C classes, D features, N sample ids; ``f`` features, ``z`` logits, ``u`` mask and ``v`` equalisation before
the sigmoid.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastadvisor.loading.batch import Batch
from fastadvisor.methods.stages import Stage
from fastadvisor_kernels import Beta, mes_cross_entropy, reweight_features

GATES = ("mask", "equalisation")
"""Outputs of an advisor that are taken through a sigmoid."""


class DataFacts(NamedTuple):
    """What a method may know of the training set."""

    classes: int
    """C."""
    samples: int
    """N: sample ids are below it."""
    label_counts: Tensor
    """(C,) int64: training images per class, by the labels as given, which may be wrong; never by the true ones."""

    def to_plain(self) -> dict[str, Any]:
        """Return it as a checkpoint holds it."""
        return self._asdict()

    @classmethod
    def from_plain(cls, state: Mapping[str, Any]) -> "DataFacts":
        """Return what :meth:`to_plain` was taken of."""
        return cls(int(state["classes"]), int(state["samples"]), state["label_counts"])


class Clock(NamedTuple):
    """Where a run stands."""

    epoch: int
    """Counted from 0."""
    epochs: int
    """Of the whole run."""
    stage: int = 0
    """Which stage of :meth:`Method.stages`, counted from 0."""
    stage_epoch: int = 0
    """Within the stage, counted from 0."""
    stage_epochs: int = 1
    """Of the stage."""


class Seen(NamedTuple):
    """What the meta-parameters are shown of a batch."""

    features: Tensor
    """(B, D)."""
    losses: Tensor
    """(B,) plain cross-entropy on unmasked features, float32 (Algorithm 1, Loss Pre-calculation)."""
    batch: Batch
    """Images, labels (B,) and ids (B,)."""
    draw: Beta
    """What :meth:`Method.draw` returned for these samples."""


class Advice:
    """What the meta-parameters say of a batch: named tensors, and β. What a method does without is not there.

    mask, u (B, D): features become f ⊙ σ(u). equalisation, v (B, C): class k weighs 1 − β σ(v_k) in the softmax.
    weight (B,): factor of each sample's loss.

    Args:
        beta: as in ``mes_cross_entropy``.
        outputs: tensors by name; None is left out.
    """

    def __init__(self, *, beta: Beta = None, **outputs: Tensor | None) -> None:
        self.beta = beta
        self.outputs: dict[str, Tensor] = {name: value for name, value in outputs.items() if value is not None}

    def get(self, name: str) -> Tensor | None:
        """Return the output ``name``; None where the method does without it."""
        return self.outputs.get(name)

    def detach(self) -> "Advice":
        """Return the same advice as constants."""
        return Advice(beta=self.beta, **{name: value.detach() for name, value in self.outputs.items()})

    def named(self, pattern: str) -> dict[str, Tensor]:
        """Return the outputs by what ``pattern`` makes of their names."""
        return {pattern.format(name): value for name, value in self.outputs.items()}


class Method(nn.Module):
    """Plain cross-entropy, and the frame of every other method. Parameters and buffers are saved with the run.

    A method with another loss overrides :meth:`sample_losses`; one with meta-parameters builds an ``advisor`` and overrides
    :meth:`advise`. The meta-gradient stays exact with any loss (metagrad/head_tangent.py).

    Args:
        settings: an instance of the method's ``Settings``.
        features: D.
        facts: of the training set.
    """

    @dataclass
    class Settings:
        """The settings of plain cross-entropy: none. A method with settings has a dataclass of this name of its own."""

    advisor_lr: ClassVar[float] = 1e-4
    """Adam's rate where the user gives none (paper 4.2)."""
    advisor_weight_decay: ClassVar[float] = 0.0
    of_one_batch: ClassVar[bool] = False
    """Whether the meta-parameters belong to the batch and are forgotten after it, as L2RW's are."""

    needs: ClassVar[tuple[str, ...]] = ()
    """Of :class:`DataFacts`, besides the classes: what the method goes by."""

    def __init__(self, settings: Any, features: int, facts: DataFacts) -> None:
        super().__init__()
        self.settings = settings
        self.features = features
        self.facts = facts
        self.advisor: nn.Module | None = None
        self.batch_mean: Callable[[Tensor], Tensor] = Tensor.mean
        """(B,) to the mean over the whole batch, of which there may be other parts elsewhere; differentiable."""

    @classmethod
    def needs_whole_batch(cls, settings: Any) -> str | None:
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

    def stages(self) -> tuple[Stage, ...]:
        """Return the parts of the run, whose shares sum to 1."""
        return (Stage(),)

    def begin_epoch(self, clock: Clock) -> None:
        """Prepare for an epoch; ``clock`` alone decides how.

        Called once more where a run is resumed in the middle of an epoch.
        """

    def draw(self, rows: int, device: torch.device) -> Beta:
        """Return this iteration's random numbers for ``rows`` samples, shared by Virtual-Train and Actual-Train."""
        return None

    def observe(self, z_BC: Tensor, batch: Batch) -> None:
        """Look at the logits of a batch: the only place where buffers may change.

        Called before the advice and the loss, once an iteration for every sample: with micro-batches for each of them.

        Args:
            z_BC: logits of unmasked features, constants, in the dtype of the forward pass.
            batch: labels (B,) and ids (B,). Of several processes all see the samples of all, but the images of their own.
        """

    def advise(self, seen: Seen) -> Advice:
        """Return the advice on a batch, with a graph to the advisor's parameters.

        What is ``seen`` are constants, unless ``--advisor-inputs attached``: then a graph to them too.
        """
        return Advice()

    def sample_losses(self, z_BC: Tensor, batch: Batch) -> Tensor:
        """Return the training loss of each sample (B,), float32, differentiable in the logits ``z_BC``."""
        return mes_cross_entropy(z_BC, None, batch.labels, None)

    def loss(self, f_BD: Tensor, batch: Batch, head: nn.Module, advice: Advice) -> Tensor:
        """Return the mean training loss, a scalar (Algorithm 1, Virtual-Train and Actual-Train)."""
        mask, equalisation, weight = (advice.get(name) for name in ("mask", "equalisation", "weight"))
        z_BC = head(f_BD if mask is None else reweight_features(f_BD, mask))
        if equalisation is None:
            loss_B = self.sample_losses(z_BC, batch)
        else:
            loss_B = mes_cross_entropy(z_BC, equalisation, batch.labels, advice.beta)
        return (loss_B if weight is None else weight * loss_B).mean()

    def adjust(self, z_BC: Tensor) -> Tensor:
        """Return the logits that are tested, (B, C), for those of the classifier."""
        return z_BC


class Adjusted(nn.Module):
    """A classifier as it is tested: with what its method does to the logits then.

    Args:
        model: (B, 3, H, W) → (B, C).
        method: whose :meth:`Method.adjust` it is.
    """

    def __init__(self, model: nn.Module, method: Method) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, images: Tensor) -> Tensor:
        """Return the adjusted logits."""
        return self.method.adjust(self.model(images))
