"""The loader for data sets that fit in device memory: there are no workers, no copies, and no waiting for the host."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastadvisor.datasets.images import ArrayImages
from fastadvisor.datasets.types import TrainingData, Triple
from fastadvisor.errors import UserError
from fastadvisor.loading.augment import Augmentation, normalize
from fastadvisor.loading.backends.stream import check_state, set_generator
from fastadvisor.loading.batch import Batch
from fastadvisor.loading.samplers import Sampler, Shuffled
from fastadvisor.runtime.share import Share


@dataclass(frozen=True)
class ResidentImages:
    """The images and labels of a data set in device memory, made once and shared by the training and the meta loader."""

    images: Tensor
    """(N, H, W, 3) uint8."""
    labels: Tensor
    """(N,) int64 by sample id."""

    @classmethod
    def of(cls, data: TrainingData, device: torch.device) -> "ResidentImages":
        """Move ``data``, whose images are in memory, to ``device``; on the CPU the memory is shared.

        Raises:
            UserError: the images do not fit in the GPU's free memory.
        """
        assert isinstance(data.images, ArrayImages)
        pixels = data.images.pixels
        needed = pixels.numel()
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if needed > free:
                raise UserError(
                    f"The images of {data.name} need {needed / 1e9:.1f} GB and {device} has {free / 1e9:.1f} GB free: "
                    "add --loader dali or torch, or choose smaller images with --image-size."
                )
        return cls(pixels.to(device), data.labels.to(device))


class ResidentLoader:
    """An endless stream of augmented batches. Every epoch has a new order; its last, partial batch is dropped."""

    def __init__(
        self,
        data: TrainingData | ResidentImages,
        ids: Tensor,
        batch_size: int,
        *,
        augment: Augmentation,
        device: torch.device,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """Set up.

        Args:
            data: the images and labels; several loaders may share the same ``ResidentImages``.
            ids: (n,) int64, the samples to draw from.
            batch_size: batch size of this rank; that of all ranks together is at most n.
            augment: turns (B, H, W, 3) uint8 into augmented, normalised (B, 3, H, W) float32.
            device: the device that the batches are made on.
            seed: the seed of the order and the augmentation: another one for each loader, the same one on all ranks.
            rank: number of this process, which gets the ``rank``-th part of each batch of all ranks.
            ranks: number of processes that share an epoch.

        Raises:
            UserError: a batch is larger than the set it is drawn from, or the padding does not fit the images.
        """
        if batch_size * ranks > len(ids):
            raise UserError(
                f"A batch of {batch_size * ranks} is larger than the {len(ids)} images to draw from: lower its size."
            )
        self.table = data if isinstance(data, ResidentImages) else ResidentImages.of(data, device)
        augment.check(self.table.images)
        self.batch_size, self.augment = batch_size, augment
        self._share = Share(rank, ranks)
        self._ids = ids.to(device)
        self._generator, self._host = torch.Generator(device).manual_seed(seed), torch.Generator().manual_seed(seed)
        self._sampler: Sampler | None = None
        """None: every sample once, in an order drawn on the device."""
        self._seed, self._epochs = seed, 0
        self._order = self._permutation()
        self._position = 0  # an integer on the host, which is known without waiting for the device
        self.waited = 0.0
        """Seconds spent waiting, as for every loader; here there is nothing to wait for."""

    def __len__(self) -> int:
        """Return the number of full batches in an epoch."""
        return len(self._ids) // self._share.whole(self.batch_size)

    def __iter__(self) -> "ResidentLoader":
        return self

    def __next__(self) -> Batch:
        return self.next_batch()

    def next_batch(self) -> Batch:
        """Return the next batch; begin a new epoch if less than a batch is left. Never waits for the device."""
        whole = self._share.whole(self.batch_size)
        if self._position + whole > len(self._ids):
            self._order, self._position = self._permutation(), 0
        ids = self._ids[self._order[self._position : self._position + whole][self._share.part(self.batch_size)]]
        self._position += whole
        images = self.augment(self.table.images, ids, self._generator, self._host, self._share)
        return Batch(images, self.table.labels[ids], ids)

    def use(self, sampler: Sampler, *, anew: bool) -> None:
        """Draw epochs with ``sampler``; if ``anew``, the next batch begins an epoch."""
        self._sampler = None if isinstance(sampler, Shuffled) else sampler
        if anew:
            self._position = len(self._ids)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream, as CPU tensors and integers."""
        return {
            "generator": self._generator.get_state(),
            "host": self._host.get_state(),
            "order": self._order.cpu().clone(),
            "position": self._position,
            "epochs": self._epochs,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where the loader that wrote ``state`` stood.

        Raises:
            UserError: the state is that of another loader or training set, or of another kind of device.
        """
        check_state(state, "order", len(self._ids))
        set_generator(self._generator, state["generator"])
        set_generator(self._host, state["host"])
        self._order = state["order"].to(self._ids.device)
        self._position, self._epochs = int(state["position"]), int(state["epochs"])

    def close(self) -> None:
        """Do nothing: there are no threads or processes."""

    def _permutation(self) -> Tensor:
        self._epochs += 1
        if self._sampler is not None:
            labels = self.table.labels[self._ids].cpu().numpy()
            rng = np.random.default_rng([self._seed, self._epochs])
            places = self._sampler.epoch(np.arange(len(self._ids)), labels, rng)
            return torch.from_numpy(places).to(self._ids.device)
        return torch.randperm(len(self._ids), generator=self._generator, device=self._ids.device)


class ResidentEvaluation:
    """The test images in order, each once; rank r of R yields every R-th image, from number r on."""

    def __init__(
        self, images: Tensor, labels: Tensor, batch_size: int, mean: Triple, std: Triple, rank: int = 0, ranks: int = 1
    ) -> None:
        """Take (N, H, W, 3) uint8 ``images`` and (N,) int64 ``labels`` on one device, in batches of ``batch_size``."""
        self.images, self.labels, self.batch_size, self.mean, self.std = images, labels, batch_size, mean, std
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        """Return the number of images of all ranks."""
        return len(self.labels)

    def __iter__(self) -> Iterator[Batch]:
        rows = torch.arange(self.rank, len(self.labels), self.ranks, device=self.labels.device)
        for ids in rows.split(self.batch_size) if len(rows) else ():
            yield Batch(normalize(self.images[ids], self.mean, self.std), self.labels[ids], ids)

    def close(self) -> None:
        """There is nothing to end."""
