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
    """Data set. digits comes along; the others are read from --data-root (layouts: fastadvisor/datasets/README.md)."""
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
    """Clean images a class held out as the meta-set (unused where the data set brings its own)."""
    download: Annotated[bool, Only(dataset=("cifar10", "cifar100"))] = False
    """cifar10, cifar100: fetch the archive into --data-root if it is not there."""
    image_size: Count | None = None
    """Side in pixels images are brought to; none: 224 for the papers' data sets, else the images' median, at most 224."""


@dataclass
class CorruptionConfig:
    """What is done to labels and classes (method.md, "Data protocols"; paper 4.1)."""

    TITLE: ClassVar = "Wrong labels and unequal classes"

    labels: Annotated[str | None, ESSENTIAL] = None
    """File with one label per training image in data-set order (.npy, .csv, .txt, .pt), in place of generated noise."""
    labels_key: str | None = None
    """--labels: which labels of a file that holds several, as worse_label of CIFAR-10N's CIFAR-10_human.pt."""
    noise: Annotated[Literal["none", "flip", "flip2", "semantic", "uniform", "hierarchical"], ESSENTIAL] = "none"
    """Label noise to inject."""
    noise_rate: Annotated[Fraction, ESSENTIAL] = 0.0
    """Probability that a training label is corrupted."""
    flip_map: tuple[int, ...] | None = None
    """flip: for each class the class its labels turn into; none: the customary map (numpy legacy generator, seed 1)."""
    imbalance_factor: Annotated[float, Field(ge=1, allow_inf_nan=False), ESSENTIAL] = 1.0
    """Long tail: size of the largest class over the smallest, exponential profile; 1 leaves the classes alone."""
    noise_before_imbalance: bool = False
    """Corrupt the labels before the long tail is cut (by the corrupted label) instead of after."""


@dataclass
class DataConfig(CorruptionConfig, DatasetConfig):
    """Which images, and what is done to their labels."""


@dataclass
class BatchConfig:
    """How batches are made."""

    TITLE: ClassVar = "Batches"

    batch_size: Annotated[Count, ESSENTIAL] = 128
    """Training images a step, of all processes together."""
    meta_batch_size: Count | None = None
    """Meta images a step; none: as the training batch, at most the whole meta-set."""
    accumulate: Count = 1
    """Take each batch in so many micro-batches, one after the other: less memory, the same gradients (but for BatchNorm)."""
    loader: Literal["auto", "resident", "torch", "dali", "synthetic"] = "auto"
    """resident: all images as uint8 in device memory; torch: worker processes; dali: NVIDIA DALI, which decodes on the GPU;
    synthetic: one random batch again and again, the ceiling; auto: resident where they fit, else dali, or torch without it."""
    workers: Annotated[Annotated[int, Field(ge=0, le=1024)] | None, Only(loader=("auto", "torch", "dali"))] = None
    """torch: processes, dali: threads, of the training and of the meta loader each; none: the cores, at most 16."""
    cache_size: Count | None = None
    """Keep a copy of the images with the shorter side brought to this many pixels, made once, and read that."""
    cache_dir: Annotated[str | None, Only(cache_size=GIVEN)] = None
    """--cache-size: folder of the copies; none: fastadvisor in the user's cache folder."""
    max_bad_fraction: Fraction = 0.001
    """Images that cannot be read are left out and listed in the run folder, up to this fraction of each part."""


@dataclass
class AugmentationConfig:
    """How training images are varied."""

    TITLE: ClassVar = "Augmentation"

    crop: Literal["pad", "random", "resized"] = "pad"
    """pad: reflect-pad and crop back at random; random: bring the shorter side to --resize-size and crop at
    random; resized: crop a random area and aspect ratio (torchvision's RandomResizedCrop)."""
    crop_padding: Annotated[int, Field(ge=0), Only(crop="pad")] = 4
    """--crop pad: pixels of reflected border."""
    resize_size: Count | None = None
    """Shorter side before --image-size is cropped out, in testing too; none: 256/224 of it, with --crop pad the same."""
    horizontal_flip: bool = True
    """Mirror half the images."""
    auto_augment: Literal["none", "cifar10", "imagenet"] = "none"
    """AutoAugment with the policy learned on this data set (Cubuk et al. 2019)."""
    cutout: Annotated[int, Field(ge=0)] = 0
    """Side in pixels of a square set to the mean (DeVries & Taylor 2017); 0: none."""


@dataclass
class LoaderConfig(AugmentationConfig, BatchConfig):
    """How batches are made, and their images varied."""
