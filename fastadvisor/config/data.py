"""Settings of the data: which images, what is done to their labels, how batches are made of them."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fastadvisor.config.metadata import ESSENTIAL, GIVEN, Count, Fraction, Only

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
class DatasetConfig:
    """Which images."""

    TITLE: ClassVar = "Data"

    dataset: Annotated[Dataset, ESSENTIAL] = "digits"
    """Data set. digits is built in; the others are read from --data-root (layouts: fastadvisor/datasets/README.md)."""
    data_root: Annotated[str | None, ESSENTIAL] = None
    """Folder of the data set. imagefolder: ROOT/train/<class>, ROOT/test/<class> and, if you have it, ROOT/meta/<class>."""
    variant: str | None = None
    """clothing1m: noisy (default) or clean-and-noisy; webvision: full (default) or mini (classes 0 to 49)."""
    train_list: str | None = None
    """list: training images, lines of "path label" or a CSV with path,label[,split]; none: train.txt or .csv in the root."""
    test_list: str | None = None
    """list: test images; none: test.* or val.* in the root, or the CSV's own split."""
    meta_list: str | None = None
    """Images whose labels are trusted, as the meta-set of any data set of files; none: the data set's own, or held out."""
    meta_per_class: Annotated[Count, ESSENTIAL] = 10
    """Clean images of each class held out as the meta-set; unused where the data set has a meta-set of its own."""
    download: Annotated[bool, Only(dataset=("cifar10", "cifar100"))] = False
    """cifar10, cifar100: download the archive into --data-root if it is not there."""
    image_size: Count | None = None
    """Side in pixels that images are resized to; none: 224 for the papers' data sets, else the median of the images, at most
    224."""


@dataclass
class CorruptionConfig:
    """What is done to labels and classes (method.md, "Data protocols"; paper 4.1)."""

    TITLE: ClassVar = "Wrong labels and unequal classes"

    labels: Annotated[str | None, ESSENTIAL] = None
    """File with one label per training image in data-set order (.npy, .csv, .txt, .pt), in place of generated noise."""
    labels_key: str | None = None
    """--labels: name of the labels to take from a file that holds several, such as worse_label in CIFAR-10_human.pt
    (CIFAR-10N)."""
    noise: Annotated[Literal["none", "flip", "flip2", "semantic", "uniform", "hierarchical"], ESSENTIAL] = "none"
    """Label noise to inject."""
    noise_rate: Annotated[Fraction, ESSENTIAL] = 0.0
    """Probability that a training label is corrupted."""
    flip_map: tuple[int, ...] | None = None
    """--noise flip: for each class, the class that its labels are changed to; none: the map of the earlier papers (numpy legacy
    generator, seed 1)."""
    imbalance_factor: Annotated[float, Field(ge=1, allow_inf_nan=False), ESSENTIAL] = 1.0
    """Long tail: size of the largest class divided by that of the smallest, with an exponential profile; 1: no long tail."""
    noise_before_imbalance: bool = False
    """Corrupt the labels before the long tail is cut, so that classes are those of the corrupted labels, instead of after."""


@dataclass
class DataConfig(CorruptionConfig, DatasetConfig):
    """Which images, and what is done to their labels."""


@dataclass
class BatchConfig:
    """How batches are made."""

    TITLE: ClassVar = "Batches"

    batch_size: Annotated[Count, ESSENTIAL] = 128
    """Training images in a step, over all processes together."""
    meta_batch_size: Count | None = None
    """Meta images in a step; none: as many as training images, but at most the whole meta-set."""
    accumulate: Count = 1
    """Split each batch into this many micro-batches, computed one after the other: less memory, and the same gradients except
    for batch normalisation."""
    loader: Literal["auto", "resident", "torch", "dali", "synthetic"] = "auto"
    """resident: all images as uint8 in device memory; torch: worker processes; dali: NVIDIA DALI, which decodes on the GPU;
    synthetic: the same random batch every time, to measure the speed
    without loading; auto: resident where they fit, else dali, or torch without it."""
    workers: Annotated[Annotated[int, Field(ge=0, le=1024)] | None, Only(loader=("auto", "torch", "dali"))] = None
    """Worker processes (torch) or threads (dali) for each of the training and the meta loader; none: one a core, at most 16."""
    cache_size: Count | None = None
    """Read from a copy of the images, made once, whose shorter side is resized to this many pixels."""
    cache_dir: Annotated[str | None, Only(cache_size=GIVEN)] = None
    """--cache-size: folder of the copies; none: fastadvisor in the user's cache folder."""
    max_bad_fraction: Fraction = 0.001
    """Images that cannot be read are left out and listed in the run folder. The run stops if they are more than this fraction
    of the training, meta or test images."""


@dataclass
class AugmentationConfig:
    """How training images are varied."""

    TITLE: ClassVar = "Augmentation"

    crop: Literal["pad", "random", "resized"] = "pad"
    """pad: pad by reflection and crop at random; random: resize the shorter side to --resize-size and crop at
    random; resized: crop a random area and aspect ratio (torchvision's RandomResizedCrop)."""
    crop_padding: Annotated[int, Field(ge=0), Only(crop="pad")] = 4
    """--crop pad: pixels of reflected border."""
    resize_size: Count | None = None
    """Shorter side that images are resized to before --image-size is cropped out, in testing too; none: 256/224 of
    --image-size, or --image-size itself with --crop pad."""
    horizontal_flip: bool = True
    """Flip each training image horizontally with probability 1/2."""
    auto_augment: Literal["none", "cifar10", "imagenet"] = "none"
    """AutoAugment with the policy learned on this data set (Cubuk et al. 2019)."""
    cutout: Annotated[int, Field(ge=0)] = 0
    """Side in pixels of a random square that is set to the mean colour (DeVries & Taylor 2017); 0: none."""


@dataclass
class LoaderConfig(AugmentationConfig, BatchConfig):
    """How batches are made, and their images varied."""
