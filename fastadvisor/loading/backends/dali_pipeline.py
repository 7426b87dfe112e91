"""What DALI does with a batch, and the pipeline that does it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastadvisor.datasets.types import Triple
from fastadvisor.loading.geometry import Geometry

PREFETCH = 3
"""Number of batches that are in DALI at a time; as many again have been read and wait for it."""

POLICIES = {"cifar10": "reduced_cifar10", "imagenet": "image_net"}
"""The names that DALI gives to the AutoAugment policies."""

TRANSLATION = 150 / 331
"""Largest translation as a fraction of the side, as in AutoAugment's own code (DALI's default moves the image out of sight)."""


@dataclass(frozen=True)
class Work:
    """What DALI does with a batch."""

    geometry: Geometry
    batch_size: int
    device: torch.device
    threads: int
    mean: Triple
    std: Triple
    training: bool
    """Whether batches are for training. With --crop pad, DALI works as for testing: the device pads and crops."""
    mirror: bool = False
    auto_augment: str = "none"
    seed: int = 0

    @property
    def cropped(self) -> bool:
        """Whether DALI crops a random window."""
        return self.training and self.geometry.crop != "pad"

    @property
    def augmented(self) -> bool:
        """Whether DALI applies AutoAugment."""
        return self.cropped and self.auto_augment != "none"

    @property
    def only_decoded(self) -> bool:
        """Whether DALI only decodes and crops, so that images are resized and mirrored in Python."""
        return self.device.type == "cpu" and not self.augmented

    @property
    def normalized(self) -> bool:
        """Whether DALI normalises the images to float32."""
        return not self.only_decoded and (self.cropped or not self.training)


def build_pipeline(work: Work, source: Callable[[], tuple[Any, ...]], checkpoint: bytes | None) -> Any:
    """Return the pipeline for ``work``.

    Args:
        work: what to do with a batch.
        source: returns the next batch as arrays, and raises StopIteration after the last.
        checkpoint: state of the random numbers to continue from; None: they begin at ``work.seed``.
    """
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.auto_aug import auto_augment as policies

    on_gpu, size = work.device.type == "cuda", work.geometry.size
    decoder = {"device": "mixed" if on_gpu else "cpu", "output_type": types.RGB, "jpeg_fancy_upsampling": True}
    resize = {"size": [size, size], "interp_type": types.INTERP_LINEAR, "antialias": True}
    normalize = {
        "dtype": types.FLOAT,
        "output_layout": "CHW",
        "mean": [255 * value for value in work.mean],
        "std": [255 * value for value in work.std],
    }

    def training() -> Any:
        encoded, anchor, shape, mirror = fn.external_source(source=source, num_outputs=4, batch=True)
        images = fn.decoders.image_slice(encoded, anchor, shape, axis_names="HW", **decoder)
        if work.only_decoded:
            return images
        images = fn.resize(images, **resize)
        if work.augmented:
            images = fn.flip(images, horizontal=mirror)
            images = policies.auto_augment(
                images, POLICIES[work.auto_augment], shape=(size, size), max_translate_rel=TRANSLATION, fill_value=0
            )
            return fn.crop_mirror_normalize(images, **normalize)
        return fn.crop_mirror_normalize(images, mirror=mirror, **normalize)

    def testing() -> Any:
        encoded, start, end = fn.external_source(source=source, num_outputs=3, batch=True)
        images = fn.decoders.image(encoded, **decoder)
        if work.only_decoded:
            return images
        images = fn.resize(images, roi_start=start, roi_end=end, roi_relative=False, **resize)
        return fn.crop_mirror_normalize(images, **normalize) if work.normalized else images

    return pipeline_def(
        training if work.cropped else testing,
        batch_size=work.batch_size,
        num_threads=max(1, work.threads),
        device_id=_index(work.device) if on_gpu else None,
        prefetch_queue_depth=PREFETCH,
        exec_dynamic=True,
        seed=work.seed,
        enable_conditionals=work.augmented,
        enable_checkpointing=work.augmented,
        checkpoint=checkpoint if work.augmented else None,
    )()


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
