"""Every setting, typed, with its default and its source; one dataclass per component."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

Count = Annotated[int, Field(gt=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Dataset = Literal[
    "digits",
    "cifar10",
    "cifar100",
    "imagefolder",
    "list",
    "webdataset",
    "imagenet-lt",
    "places-lt",
    "clothing1m",
    "webvision",
    "food101n",
    "animal10n",
]


@dataclass
class DataConfig:
    """Which images, and what is done to their labels (method.md, "Data protocols"; paper 4.1)."""

    dataset: Dataset = "digits"
    """Data set. digits comes along; the others are read from --data-root (layouts: fastadvisor/data/README.md)."""
    data_root: str | None = None
    """Folder of the data set. imagefolder: ROOT/train/<class>, ROOT/test/<class> and, if you have it, ROOT/meta/<class>."""
    variant: str | None = None
    """clothing1m: noisy (default) or clean-and-noisy; webvision: full (default) or mini (classes 0 to 49)."""
    train_list: str | None = None
    """list: training images, lines of "path label" or a CSV with path,label[,split]; none: train.txt or .csv in the root."""
    test_list: str | None = None
    """list: test images; none: test.* or val.* in the root, or the CSV's own split."""
    meta_list: str | None = None
    """Images whose labels are trusted, as the meta-set of any data set of files; none: the data set's own, or held out."""
    download: bool = False
    """cifar10, cifar100: fetch the archive into --data-root if it is not there."""
    image_size: Count | None = None
    """Side in pixels images are brought to; none: 224 for the papers' data sets, else the images' median, at most 224."""
    imbalance_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """Long tail: size of the largest class over the smallest, exponential profile; 1 leaves the classes alone."""
    noise: Literal["none", "flip", "flip2", "semantic", "uniform", "hierarchical"] = "none"
    """Label noise to inject."""
    noise_rate: Fraction = 0.0
    """Probability that a training label is corrupted."""
    flip_map: tuple[int, ...] | None = None
    """flip: for each class the class its labels turn into; none: the customary map (numpy legacy generator, seed 1)."""
    noise_before_imbalance: bool = False
    """Corrupt the labels before the long tail is cut (by the corrupted label) instead of after."""
    labels: str | None = None
    """File with one label per training image in data-set order (.npy, .csv, .txt, .pt), in place of generated noise."""
    labels_key: str | None = None
    """--labels: which labels of a file that holds several, as worse_label of CIFAR-10N's CIFAR-10_human.pt."""
    meta_per_class: Count = 10
    """Clean images a class held out as the meta-set (unused where the data set brings its own)."""


@dataclass
class LoaderConfig:
    """How batches are made."""

    loader: Literal["auto", "resident", "torch", "dali", "synthetic"] = "auto"
    """resident: all images as uint8 in device memory; torch: worker processes; dali: NVIDIA DALI, which decodes on the GPU;
    synthetic: one random batch again and again, the ceiling; auto: resident where they fit, else dali, or torch without it."""
    workers: Annotated[int, Field(ge=0, le=1024)] | None = None
    """torch: processes, dali: threads, of the training and of the meta loader each; none: the cores, at most 16."""
    batch_size: Count = 128
    """Training images a step, of all processes together."""
    meta_batch_size: Count | None = None
    """Meta images a step; none: as the training batch, at most the whole meta-set."""
    accumulate: Count = 1
    """Take each batch in so many micro-batches, one after the other: less memory, the same gradients (but for BatchNorm)."""
    crop: Literal["pad", "random", "resized"] = "pad"
    """Augmentation. pad: reflect-pad and crop back at random; random: bring the shorter side to --resize-size and crop at
    random; resized: crop a random area and aspect ratio (torchvision's RandomResizedCrop)."""
    crop_padding: Annotated[int, Field(ge=0)] = 4
    """--crop pad: pixels of reflected border."""
    resize_size: Count | None = None
    """Shorter side before --image-size is cropped out, in testing too; none: 256/224 of it, with --crop pad the same."""
    horizontal_flip: bool = True
    """Augmentation: mirror half the images."""
    auto_augment: Literal["none", "cifar10", "imagenet"] = "none"
    """Augmentation: AutoAugment with the policy learned on this data set (Cubuk et al. 2019)."""
    cutout: Annotated[int, Field(ge=0)] = 0
    """Augmentation: side in pixels of a square set to the mean (DeVries & Taylor 2017); 0: none."""
    cache_size: Count | None = None
    """Keep a copy of the images with the shorter side brought to this many pixels, made once, and read that."""
    cache_dir: str | None = None
    """--cache-size: folder of the copies; none: fastadvisor in the user's cache folder."""
    max_bad_fraction: Fraction = 0.001
    """Images that cannot be read are left out and listed in the run folder, up to this fraction of each part."""


@dataclass
class ModelConfig:
    """The classifier."""

    model: str = "resnet32"
    """CIFAR ResNets resnet8/14/20/32/44/56, resnet18-cifar, resnet10, any torchvision classifier, or timm/<name>."""
    pretrained: bool = False
    """Start from the library's weights (torchvision, timm)."""
    weights: str | None = None
    """Start from the classifier in this file, a state dict such as another run's model.pt."""


@dataclass
class MethodConfig:
    """The method and its advisor (paper 3.3 to 3.5, 4.2)."""

    method: str = "mfrw-mes"
    """mfrw, mes, mfrw-mes, mw-net, l2rw, or a floor: ce, meta-only, finetune."""
    advisor_width: Count = 100
    """Size of each embedding of the advisor (paper 4.2)."""
    advisor_lr: Positive | None = None
    """Adam learning rate of the advisor; none: the method's own (advisor networks 1e-4, mw-net 1e-3)."""
    advisor_weight_decay: NonNegative | None = None
    """Adam weight decay of the advisor; none: the method's own (advisor networks 0, mw-net 1e-4)."""
    beta_probability: Fraction = 0.9
    """mes: probability rho that beta is 1 (paper 4.2)."""
    beta_draw: Literal["class", "sample", "batch", "expected"] = "class"
    """mes: what one draw of beta covers; expected: beta is rho itself."""
    weight_normalization: Literal["none", "sum"] = "none"
    """mw-net: none for label noise (mean of weighted losses), sum for long tails (weights sum to 1)."""
    finetune_fraction: Fraction = 0.2
    """finetune: last part of the epochs, spent on the meta-set."""
    finetune_lr_factor: Positive = 0.1
    """finetune: learning rate of that part, over --lr."""


@dataclass
class MetaConfig:
    """The meta-gradient (design: metagrad/README.md)."""

    meta_engine: Literal["forward", "reference"] = "forward"
    """Exact engine. forward: one forward-mode pass; reference: double backward, the slow oracle."""
    meta_interval: Count | None = None
    """A meta step every so many iterations; none: every one, with --approx-meta every second."""
    virtual_gradient: Literal["auto", "own", "actual"] = "auto"
    """Gradient of the virtual step. own: as in Algorithm 1; actual: the actual step's, which leaves the advisor one step
    behind and spares a backward pass; auto: own, with --approx-meta actual."""
    advisor_inputs: Literal["detached", "attached"] = "detached"
    """Whether the classifier's training gradient flows through features and loss into the advisor."""
    lean: bool = False
    """Hold one graph at a time: free the training graph before the meta step and compute it again after it."""
    approx_meta: bool = False
    """Approximate the meta-gradient: a faster set of the settings around this one."""
    approx_layers: Literal["all", "top", "random", "learned"] = "top"
    """--approx-meta: layers that count. top: the top --approx-stages stages; random, learned: --approx-budget residual blocks
    (or layers), chosen at each meta step at random or by FaMUS's gradient samplers."""
    approx_stages: Count = 2
    """--approx-layers top: number of stages."""
    approx_budget: Count = 4
    """--approx-layers random, learned: number of layers."""
    approx_tangent: Literal["auto", "forward", "difference"] = "auto"
    """--approx-meta: derivative of the features by a forward-mode pass, or by a finite difference, which costs half but needs
    float32 in full (no --amp, no TF32); auto: difference on the CPU in float32, else forward."""
    validate_meta_every: Annotated[int, Field(ge=0, lt=2**31)] = 100
    """--approx-meta: meta steps from one comparison with the exact meta-gradient to the next; 0: never."""
    min_meta_cosine: Annotated[float, Field(ge=-1, le=1)] = 0.5
    """--approx-meta: cosine to the exact meta-gradient under which the run continues exactly."""
    virtual_step: Literal["sgd", "optimizer"] = "sgd"
    """Virtual-Train. sgd: plain SGD at the current rate; optimizer: with its momentum and weight decay."""


@dataclass
class OptimizerConfig:
    """The classifier's optimizer, and its schedule."""

    optimizer: Literal["sgd", "nesterov", "adam", "adamw", "lars", "lamb", "apex-sgd", "apex-adam", "apex-lamb"] = "sgd"
    """Of the classifier. lars, lamb: timm's, for large batches; apex-...: NVIDIA apex's fused ones, where it is installed."""
    epochs: Count = 200
    """Passes over the training set."""
    iterations: Count | None = None
    """Length of the run in training steps, in place of --epochs; rounded to whole epochs."""
    lr: Positive = 0.1
    """Learning rate at the start."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of sgd, nesterov and lars; beta1 of the others stays 0.9."""
    weight_decay: NonNegative = 5e-4
    """Weight decay."""
    schedule: Literal["step", "cosine", "constant"] = "step"
    """Learning-rate schedule."""
    milestones: tuple[Fraction, ...] = (0.8, 0.9)
    """step: where the rate drops, as fractions of the run, so that a shorter run keeps its shape."""
    lr_decay: Fraction = 0.1
    """step: factor at each milestone."""
    warmup_epochs: NonNegative = 0.0
    """Linear warm-up at the start of each phase, in epochs; may be a fraction."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Layer-wise learning rates: factor from each layer to the one below it (head at --lr)."""
    clip_grad_norm: Positive | None = None
    """Cut the actual gradient to this norm; none: leave it."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Test, and leave as model.pt, an exponential moving average of the weights, as 0.9998; none: the weights themselves."""


@dataclass
class RunConfig:
    """Where and how it runs."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of everything: meta-set, long tail, noise, weights, data order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device."""
    amp: bool = False
    """Mixed precision: forward passes of the classifier by autocast; losses, advisor and statistics stay in float32."""
    amp_dtype: Literal["auto", "bfloat16", "float16"] = "auto"
    """--amp: auto: bfloat16, or float16 with a scaled loss on GPUs without it."""
    memory_format: Literal["auto", "contiguous", "channels-last"] = "auto"
    """Images and weights in memory as NCHW or NHWC; auto: channels-last with --amp on a GPU, whose convolutions want it."""
    tf32: bool = False
    """Float32 matrix products in TF32, on GPUs that have it (convolutions are anyway, which is torch's default)."""
    cuda_graph: Literal["auto", "on", "off"] = "off"
    """Record a whole iteration as a CUDA graph and replay it, which spares a GPU the wait for its launches. on: end where that
    cannot be; auto: on a GPU, where it can be; off: launch operations one by one, until the rest has run on a GPU."""
    output: str | None = None
    """Run folder; none: a new one under runs/."""
    resume: bool | Literal["auto"] = False
    """Continue the run in --output from its last.pt; auto: or begin it, if there is none (what a preemptible job types)."""
    save_minutes: NonNegative = 10.0
    """Save so often within an epoch, too; 0: only at the end of each."""
    save_every: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Save every so many iterations as well; 0: no such rule."""
    keep: Count = 1
    """Checkpoints to keep, newest first; more than one: as iteration-<number>.pt beside last.pt."""
    nan_policy: Literal["stop", "skip", "ignore"] = "stop"
    """Values that are not finite. stop: end the run, and save replay.pt; skip: leave that step out and count it; ignore: look
    at the end of each epoch only, which spares waiting for the device twice a step."""
    deterministic: bool = False
    """Only operations that give the same numbers every time, on a GPU too; slower there."""
    dry_run: bool = False
    """Check everything, time ten iterations, write nothing."""
    sync_bn: bool = False
    """Several processes: batch normalisation over all their images, instead of each over its own."""
    keep_memory: bool = True
    """CPU: keep freed memory in the process instead of returning it to the system at every step (glibc)."""
    eval_batch_size: Count = 500
    """Images a forward pass when testing."""
    progress: bool = True
    """Progress bar, and a line an epoch; off: nothing but the result, and what one must know."""
    tensorboard: bool = True
    """TensorBoard files in the run folder, where tensorboard is installed."""


@dataclass
class Config(RunConfig, OptimizerConfig, MetaConfig, MethodConfig, ModelConfig, LoaderConfig, DataConfig):
    """Everything ``fastadvisor train`` can be told."""


@dataclass
class CompareConfig(Config):
    """``fastadvisor compare``: the settings of train, for several methods and seeds."""

    methods: str = "ce,meta-only,mw-net,mfrw-mes"
    """Methods to compare, separated by commas."""
    seeds: Count = 1
    """Runs a method, with seeds --seed, --seed + 1, ..."""


@dataclass
class CheckConfig(Config):
    """``fastadvisor data check``: the settings of train; those that concern no data are passed over."""

    decode: bool = True
    """Decode every image; off: files are read and compared only."""
