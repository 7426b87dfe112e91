"""Settings of the learning: the classifier, the meta-gradient, the optimizer and its schedule."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fastadvisor.config.metadata import ESSENTIAL, Count, Fraction, NonNegative, Only, Positive


@dataclass
class ModelConfig:
    """The classifier."""

    TITLE: ClassVar = "Classifier"

    model: Annotated[str, ESSENTIAL] = "resnet32"
    """CIFAR ResNets resnet8/14/20/32/44/56, resnet18-cifar, resnet10, any torchvision classifier, or timm/<name>."""
    pretrained: Annotated[bool, ESSENTIAL] = False
    """Start from the library's weights (torchvision, timm)."""
    weights: str | None = None
    """Start from the classifier in this file, a state dict such as another run's model.pt."""


@dataclass
class MetaStepConfig:
    """The meta-gradient (design: metagrad/README.md)."""

    TITLE: ClassVar = "Meta-gradient"

    meta_engine: Literal["forward", "reference"] = "forward"
    """Exact engine. forward: one forward-mode pass; reference: double backward, the slow oracle."""
    meta_interval: Count | None = None
    """A meta step every so many iterations; none: every one, with --approx-meta every second."""
    virtual_gradient: Literal["auto", "own", "actual"] = "auto"
    """Gradient of the virtual step. own: as in Algorithm 1; actual: the actual step's, which leaves the advisor one step
    behind and spares a backward pass; auto: own, with --approx-meta actual."""
    virtual_step: Literal["sgd", "optimizer"] = "sgd"
    """Virtual-Train. sgd: plain SGD at the current rate; optimizer: with its momentum and weight decay."""
    advisor_inputs: Literal["detached", "attached"] = "detached"
    """Whether the classifier's training gradient flows through features and loss into the advisor."""
    lean: bool = False
    """Hold one graph at a time: free the training graph before the meta step and compute it again after it."""
    approx_meta: Annotated[bool, ESSENTIAL] = False
    """Approximate the meta-gradient: about a third of the price (--help-all lists its settings)."""


@dataclass
class ApproximationConfig:
    """What ``--approx-meta`` leaves out, and how it is watched."""

    TITLE: ClassVar = "Approximate meta-gradient"
    ONLY: ClassVar = Only(approx_meta=True)

    approx_layers: Literal["all", "top", "random", "learned"] = "top"
    """Layers that count. top: the top --approx-stages stages; random, learned: --approx-budget residual blocks
    (or layers), chosen at each meta step at random or by FaMUS's gradient samplers."""
    approx_stages: Annotated[Count, Only(approx_layers="top")] = 2
    """--approx-layers top: number of stages."""
    approx_budget: Annotated[Count, Only(approx_layers=("random", "learned"))] = 4
    """--approx-layers random, learned: number of layers."""
    approx_tangent: Literal["auto", "forward", "difference"] = "auto"
    """Derivative of the features by a forward-mode pass, or by a finite difference, which costs half but needs
    float32 in full (no --amp, no TF32); auto: difference on the CPU in float32, else forward."""
    validate_meta_every: Annotated[int, Field(ge=0, lt=2**31)] = 100
    """Meta steps from one comparison with the exact meta-gradient to the next; 0: never."""
    min_meta_cosine: Annotated[float, Field(ge=-1, le=1)] = 0.5
    """Cosine to the exact meta-gradient under which the run continues exactly."""


@dataclass
class MetaConfig(ApproximationConfig, MetaStepConfig):
    """The meta-gradient, exact or approximate."""


@dataclass
class LengthConfig:
    """How long the run is."""

    TITLE: ClassVar = "Length"

    epochs: Annotated[Count, ESSENTIAL] = 200
    """Passes over the training set."""
    iterations: Annotated[Count | None, ESSENTIAL] = None
    """Length of the run in training steps, in place of --epochs; rounded to whole epochs."""


@dataclass
class UpdateConfig:
    """How the classifier's weights are updated."""

    TITLE: ClassVar = "Optimizer"

    optimizer: Literal["sgd", "nesterov", "adam", "adamw", "lars", "lamb", "apex-sgd", "apex-adam", "apex-lamb"] = "sgd"
    """Of the classifier. lars, lamb: timm's, for large batches; apex-...: NVIDIA apex's fused ones, where it is installed."""
    lr: Annotated[Positive, ESSENTIAL] = 0.1
    """Learning rate at the start."""
    momentum: Annotated[float, Field(ge=0, lt=1), Only(optimizer=("sgd", "nesterov", "lars", "apex-sgd"))] = 0.9
    """Momentum of sgd, nesterov and lars; beta1 of the others stays 0.9."""
    weight_decay: NonNegative = 5e-4
    """Weight decay."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Layer-wise learning rates: factor from each layer to the one below it (head at --lr)."""
    clip_grad_norm: Positive | None = None
    """Cut the actual gradient to this norm; none: leave it."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Test, and leave as model.pt, an exponential moving average of the weights, as 0.9998; none: the weights themselves."""


@dataclass
class ScheduleConfig:
    """How the learning rate changes."""

    TITLE: ClassVar = "Learning-rate schedule"

    schedule: Literal["step", "cosine", "constant"] = "step"
    """Learning-rate schedule."""
    milestones: Annotated[tuple[Fraction, ...], Only(schedule="step")] = (0.8, 0.9)
    """step: where the rate drops, as fractions of the run, so that a shorter run keeps its shape."""
    lr_decay: Annotated[Fraction, Only(schedule="step")] = 0.1
    """step: factor at each milestone."""
    warmup_epochs: NonNegative = 0.0
    """Linear warm-up at the start of each phase, in epochs; may be a fraction."""


@dataclass
class OptimizerConfig(ScheduleConfig, UpdateConfig, LengthConfig):
    """The classifier's optimizer, its schedule, and the length of both."""
