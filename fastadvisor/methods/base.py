"""What a method is: the training loss behind the features, and the meta-parameters that this loss depends on.

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
"""The outputs of an advisor to which a sigmoid is applied."""


class DataFacts(NamedTuple):
    """What a method may know about the training set."""

    classes: int
    """C."""
    samples: int
    """N: sample ids are 0 to N − 1."""
    label_counts: Tensor
    """(C,) int64: training images of each class, by the labels as given, which may be wrong; never by the true labels."""

    def to_plain(self) -> dict[str, Any]:
        """Return the facts as a checkpoint saves them."""
        return self._asdict()

    @classmethod
    def from_plain(cls, state: Mapping[str, Any]) -> "DataFacts":
        """Return the facts that :meth:`to_plain` turned into ``state``."""
        return cls(int(state["classes"]), int(state["samples"]), state["label_counts"])


class Clock(NamedTuple):
    """How far a run is."""

    epoch: int
    """Index of the epoch in the run, from 0."""
    epochs: int
    """Number of epochs of the whole run."""
    stage: int = 0
    """Index of the stage in :meth:`Method.stages`, from 0."""
    stage_epoch: int = 0
    """Index of the epoch in the stage, from 0."""
    stage_epochs: int = 1
    """Number of epochs of the stage."""


class Seen(NamedTuple):
    """What the advice on a batch may depend on."""

    features: Tensor
    """(B, D)."""
    losses: Tensor
    """ℓpre (B,): plain cross-entropy on unmasked features, float32 (Algorithm 1, Loss Pre-calculation)."""
    batch: Batch
    """Images, labels (B,) and ids (B,)."""
    draw: Beta
    """What :meth:`Method.draw` returned for these samples."""


class Advice:
    """The advice on a batch: named tensors, and β. Every output is optional.

    - ``mask``, u (B, D): the features become f ⊙ σ(u) (advisor paper, equation 3);
    - ``equalisation``, v (B, C): class k ≠ y has the weight 1 − β σ(v_k) in the softmax (equations 6 and 8);
    - ``weight`` (B,): factor of each sample's loss.

    Args:
        beta: β as in ``mes_cross_entropy``.
        outputs: tensors by name; those that are None are left out.
    """

    def __init__(self, *, beta: Beta = None, **outputs: Tensor | None) -> None:
        self.beta = beta
        self.outputs: dict[str, Tensor] = {name: value for name, value in outputs.items() if value is not None}

    def get(self, name: str) -> Tensor | None:
        """Return the output ``name``; None if the advice does not have it."""
        return self.outputs.get(name)

    def detach(self) -> "Advice":
        """Return the same advice without a graph."""
        return Advice(beta=self.beta, **{name: value.detach() for name, value in self.outputs.items()})

    def named(self, pattern: str) -> dict[str, Tensor]:
        """Return the outputs by their names, put in place of the ``{}`` in ``pattern``."""
        return {pattern.format(name): value for name, value in self.outputs.items()}


class Method(nn.Module):
    """Plain cross-entropy, and the base class of all methods. Parameters and buffers are saved with the run.

    A method with another loss overrides :meth:`sample_losses`; one with meta-parameters builds an ``advisor`` and overrides
    :meth:`advise`. The meta-gradient is exact for any loss (metagrad/head_tangent.py).

    Args:
        settings: an instance of the method's ``Settings``.
        features: D, the number of features.
        facts: what the method may know about the training set.
    """

    @dataclass
    class Settings:
        """Plain cross-entropy has no settings. A method with settings defines a dataclass of this name."""

    advisor_lr: ClassVar[float] = 1e-4
    """Learning rate of the advisor's Adam, unless the user sets one (advisor paper, section 4.2)."""
    advisor_weight_decay: ClassVar[float] = 0.0
    """Weight decay of the advisor's Adam, unless the user sets one."""
    of_one_batch: ClassVar[bool] = False
    """Whether the meta-parameters belong to one batch and are discarded after it, like the sample weights of L2RW."""

    needs: ClassVar[tuple[str, ...]] = ()
    """Names of the fields of :class:`DataFacts`, besides ``classes``, that the method uses."""

    def __init__(self, settings: Any, features: int, facts: DataFacts) -> None:
        super().__init__()
        self.settings = settings
        self.features = features
        self.facts = facts
        self.advisor: nn.Module | None = None
        self.batch_mean: Callable[[Tensor], Tensor] = Tensor.mean
        """From (B,) to the mean over the batch of all ranks, differentiable; the trainer sets it for several ranks."""

    @classmethod
    def needs_whole_batch(cls, settings: Any) -> str | None:
        """Return the flag that makes the method need a whole batch at once, so that --accumulate is excluded; else None."""
        return None

    @property
    def learns(self) -> bool:
        """Whether the method has meta-parameters, and so needs meta steps."""
        return self.advisor is not None

    def meta_parameters(self) -> list[Tensor]:
        """Return the meta-parameters θ; may be called only after :meth:`advise`, which may create them."""
        return [] if self.advisor is None else list(self.advisor.parameters())

    def meta_parameter_names(self) -> list[str]:
        """Return the names of the meta-parameters for messages, in the order of :meth:`meta_parameters`."""
        return [] if self.advisor is None else [name for name, _ in self.advisor.named_parameters()]

    def learn(self, gradients: Sequence[Tensor]) -> None:
        """Meta-Train: store ∇θ Lmeta where the advisor's optimizer, which steps next, finds it.

        Args:
            gradients: ∇θ Lmeta, in the order and the shapes of :meth:`meta_parameters`.
        """
        for parameter, gradient in zip(self.meta_parameters(), gradients, strict=True):
            parameter.grad = gradient

    def stages(self) -> tuple[Stage, ...]:
        """Return the stages of the run, in order; their fractions sum to 1."""
        return (Stage(),)

    def begin_epoch(self, clock: Clock) -> None:
        """Prepare for an epoch. What this does may depend on ``clock`` only.

        It is called a second time for the same epoch if a run is resumed in the middle of it.
        """

    def draw(self, rows: int, device: torch.device) -> Beta:
        """Return random numbers for ``rows`` samples, used by Virtual-Train and Actual-Train of an iteration; None for none."""
        return None

    def observe(self, z_BC: Tensor, batch: Batch) -> None:
        """Look at the logits of a batch. This is the only method that may change buffers.

        Called before the advice and the loss of an iteration, once for each sample: with micro-batches, once for each of them.

        Args:
            z_BC: logits of unmasked features, detached, in the dtype of the forward pass.
            batch: labels (B,) and ids (B,). With several ranks ``z_BC``, labels and ids are those of all ranks, and the images
                are those of this rank.
        """

    def advise(self, seen: Seen) -> Advice:
        """Return the advice on a batch, with a graph to the meta-parameters.

        Args:
            seen: what the advice may depend on. Features and losses are detached, unless ``--advisor-inputs attached`` is set.
        """
        return Advice()

    def sample_losses(self, z_BC: Tensor, batch: Batch) -> Tensor:
        """Return the training loss of each sample (B,), float32, differentiable in the logits ``z_BC``."""
        return mes_cross_entropy(z_BC, None, batch.labels, None)

    def loss(self, f_BD: Tensor, batch: Batch, head: nn.Module, advice: Advice) -> Tensor:
        """Return the mean training loss, a scalar (Algorithm 1, Virtual-Train and Actual-Train).

        Args:
            f_BD: features.
            batch: labels (B,) and ids (B,).
            head: from the features to the logits.
            advice: the advice on the batch.
        """
        mask, equalisation, weight = (advice.get(name) for name in ("mask", "equalisation", "weight"))
        z_BC = head(f_BD if mask is None else reweight_features(f_BD, mask))
        if equalisation is None:
            loss_B = self.sample_losses(z_BC, batch)
        else:
            loss_B = mes_cross_entropy(z_BC, equalisation, batch.labels, advice.beta)
        return (loss_B if weight is None else weight * loss_B).mean()

    def adjust(self, z_BC: Tensor) -> Tensor:
        """Return the logits (B, C) to predict by at test time, given those of the classifier.

        The result may depend only on ``z_BC``, the settings and the facts: a finished run is tested without the method's state.
        """
        return z_BC


class Adjusted(nn.Module):
    """A classifier whose logits are adjusted by its method, as they are at test time.

    Args:
        model: from images (B, 3, H, W) to logits (B, C).
        method: the method whose :meth:`Method.adjust` is applied.
    """

    def __init__(self, model: nn.Module, method: Method) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, images: Tensor) -> Tensor:
        """Return the adjusted logits."""
        return self.method.adjust(self.model(images))
