"""torch's DataLoader: a worker process makes a whole batch, with torchvision's decoder and transforms."""

import signal
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from fastadvisor.data.decode import decode_rgb, read
from fastadvisor.data.geometry import MIRROR, Draws, Geometry
from fastadvisor.data.images import Images
from fastadvisor.data.jpeg import plain_jpeg_size
from fastadvisor.data.loaders.resize import as_in_testing, resized
from fastadvisor.data.loaders.stream import Decoded, with_spares
from fastadvisor.data.order import Spec
from fastadvisor.errors import UserError
from fastadvisor.runtime.allocator import return_freed_memory

try:
    from torchvision.io import ImageReadMode, decode_image
except ImportError:  # torchvision announces that a later release will be without it
    decode_image = None

PREFETCH = 3
"""Batches a worker may be ahead."""

POLICIES = {"cifar10": v2.AutoAugmentPolicy.CIFAR10, "imagenet": v2.AutoAugmentPolicy.IMAGENET}


class Batches(Dataset[Decoded]):
    """Makes the batch of a spec. With --crop pad the images are as in testing: the device pads and crops them."""

    def __init__(self, images: Images, geometry: Geometry, mirror: bool, auto_augment: str) -> None:
        """Take where the images are, how they are cropped, and the augmentation that is the workers' to do."""
        self.images, self.geometry = images, geometry
        cropped = geometry.crop != "pad"
        self.mirror = mirror and cropped
        self.policy = v2.AutoAugment(POLICIES[auto_augment]) if auto_augment != "none" and cropped else None

    def __getitem__(self, spec: Spec) -> Decoded:
        """Return the batch of ``spec``, images (B, S, S, 3) uint8."""
        size = self.geometry.size

        def attempt(place: int, row: int) -> Tensor:
            return self._sample(read(self.images, row), None if spec.draws is None else spec.draws[place])

        samples, ids, bad = with_spares(spec, attempt)
        out = torch.empty(len(samples), size, size, 3, dtype=torch.uint8)
        for place, sample in enumerate(samples):
            out[place] = sample.permute(1, 2, 0)
        return Decoded(out, torch.from_numpy(ids), bad)

    def _sample(self, data: bytes, draws: Draws | None) -> Tensor:
        """Return (3, S, S) uint8."""
        image = decode(data)
        if draws is None or self.geometry.crop == "pad":
            return as_in_testing(image, self.geometry)
        left, top, right, bottom = self.geometry.train_box(image.shape[-1], image.shape[-2], draws)
        image = resized(image[:, top:bottom, left:right], self.geometry.size)
        if self.mirror and draws[MIRROR] < 0.5:
            image = image.flip(-1)
        if self.policy is not None:
            # torchvision draws from the global generator; the seed is the sample's own, so that a resumed run draws the same.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(draws.view(np.uint64)[MIRROR] >> np.uint64(1)))
                image = self.policy(image)
        return image


def decode(data: bytes) -> Tensor:
    """Return any image as (3, H, W) uint8: plain JPEGs by torchvision, which is quicker, the rest by Pillow.

    Raises:
        Unreadable: as :func:`fastadvisor.data.decode.decode_rgb`.
    """
    if decode_image is not None and plain_jpeg_size(data) is not None:
        try:
            return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        except RuntimeError:  # damaged in a way that Pillow may forgive, or name
            pass
    return torch.from_numpy(np.array(decode_rgb(data))).permute(2, 0, 1)


class TorchBackend:
    """Batches from worker processes, or without any (``workers`` 0) from this one."""

    def __init__(self, batches: Batches, workers: int, pin_memory: bool) -> None:
        """Take what makes a batch, the number of processes, and whether batches are bound for a GPU."""
        self.batches, self.workers, self.pin_memory = batches, workers, pin_memory

    def decode(self, specs: Iterable[Spec]) -> Iterator[Decoded]:
        """Return the batches of ``specs``; the workers live as long as this iterator."""
        loader: DataLoader[Decoded] = DataLoader(
            self.batches,
            sampler=specs,
            batch_size=None,
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            prefetch_factor=PREFETCH if self.workers else None,
            collate_fn=_as_it_is,
            worker_init_fn=_modest,
            generator=torch.Generator(),  # seeds the workers, else from the global one: the run's other numbers would move
        )
        try:
            yield from loader
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                "A worker of the data loader was killed, as happens when memory or /dev/shm runs out: "
                "lower --workers or --batch-size."
            ) from None

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: a batch depends on its spec alone."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take nothing."""

    def close(self) -> None:
        """There is nothing to end: the workers go with the iterator."""


def _as_it_is(batch: Any) -> Any:
    return batch


def _modest(worker: int) -> None:
    """A worker holds one batch; it has no use for the heap that a training step wants kept. Signals sent to all processes of a
    run, as by Ctrl-C, are for the run to answer: it ends its workers itself.
    """
    return_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
