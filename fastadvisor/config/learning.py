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
    """Start from the pretrained weights of the library (torchvision or timm)."""
    weights: str | None = None
    """Start from the classifier in this file, a state dict such as another run's model.pt."""


@dataclass
class MetaStepConfig:
    """The meta-gradient (design: metagrad/README.md)."""

    TITLE: ClassVar = "Meta-gradient"

    meta_engine: Literal["forward", "reference"] = "forward"
    """How the exact meta-gradient is computed. forward: by one forward-mode pass; reference: by double backward, slow, for
    comparison."""
    meta_interval: Count | None = None
    """Iterations from one meta step to the next; none: 1, or 2 with --approx-meta."""
    virtual_gradient: Literal["auto", "own", "actual"] = "auto"
    """Gradient of the virtual step. own: as in Algorithm 1; actual: reuse that of the actual step, which saves a backward pass
    and leaves the advisor one step behind; auto: own, or actual with --approx-meta."""
    virtual_step: Literal["sgd", "optimizer"] = "sgd"
    """Virtual step. sgd: plain SGD at the current learning rate; optimizer: SGD with momentum and weight decay, as in the
    actual step."""
    advisor_inputs: Literal["detached", "attached"] = "detached"
    """Whether the classifier's training gradient flows through features and loss into the advisor."""
    lean: bool = False
    """Save memory: free the graph of the training pass before the meta step, and compute it again afterwards."""
    approx_meta: Annotated[bool, ESSENTIAL] = False
    """Approximate the meta-gradient: about a third of the time (--help-all lists its settings)."""


@dataclass
class ApproximationConfig:
    """What ``--approx-meta`` leaves out, and how it is compared with the exact meta-gradient."""

    TITLE: ClassVar = "Approximate meta-gradient"
    ONLY: ClassVar = Only(approx_meta=True)

    approx_layers: Literal["all", "top", "random", "learned"] = "top"
    """Layers that the approximation takes into account. top: the top --approx-stages stages; random, learned: --approx-budget
    residual blocks (or layers), chosen at each meta step at random, or by the gradient samplers of FaMUS."""
    approx_stages: Annotated[Count, Only(approx_layers="top")] = 2
    """--approx-layers top: number of stages."""
    approx_budget: Annotated[Count, Only(approx_layers=("random", "learned"))] = 4
    """--approx-layers random, learned: number of layers."""
    approx_tangent: Literal["auto", "forward", "difference"] = "auto"
    """Derivative of the features: by a forward-mode pass, or by a finite difference, which takes half the time but needs
    full float32 (no --amp, no --tf32); auto: difference on the CPU in float32, else forward."""
    validate_meta_every: Annotated[int, Field(ge=0, lt=2**31)] = 100
    """Compare with the exact meta-gradient at every so many meta steps; 0: never."""
    min_meta_cosine: Annotated[float, Field(ge=-1, le=1)] = 0.5
    """The run goes on with the exact meta-gradient if the cosine between the two falls below this."""


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
    """Optimizer of the classifier. lars, lamb: from timm, for large batches; apex-...: the fused ones of NVIDIA apex, if
    installed."""
    lr: Annotated[Positive, ESSENTIAL] = 0.1
    """Initial learning rate."""
    momentum: Annotated[float, Field(ge=0, lt=1), Only(optimizer=("sgd", "nesterov", "lars", "apex-sgd"))] = 0.9
    """Momentum of sgd, nesterov and lars; beta1 of the others stays 0.9."""
    weight_decay: NonNegative = 5e-4
    """Weight decay."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate from each layer to the one below it; the head has --lr."""
    clip_grad_norm: Positive | None = None
    """Clip the norm of the gradient of the actual step to this; none: no clipping."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay, such as 0.9998, of an exponential moving average of the weights, which is then tested and saved as model.pt; none:
    no average."""


@dataclass
class ScheduleConfig:
    """How the learning rate changes."""

    TITLE: ClassVar = "Learning-rate schedule"

    schedule: Literal["step", "cosine", "constant"] = "step"
    """Learning-rate schedule."""
    milestones: Annotated[tuple[Fraction, ...], Only(schedule="step")] = (0.8, 0.9)
    """--schedule step: where the learning rate drops, as fractions of the run."""
    lr_decay: Annotated[Fraction, Only(schedule="step")] = 0.1
    """--schedule step: factor on the learning rate at each milestone."""
    warmup_epochs: NonNegative = 0.0
    """Epochs of linear warm-up at the start of each stage; may be a fraction."""


@dataclass
class OptimizerConfig(ScheduleConfig, UpdateConfig, LengthConfig):
    """The classifier's optimizer, its schedule, and the length of both."""
