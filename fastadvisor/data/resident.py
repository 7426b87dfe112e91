"""The loader for data sets that fit in device memory: no workers, no copies, no host in the loop."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastadvisor.data.augment import Augmentation
from fastadvisor.data.types import Batch, TrainingData
from fastadvisor.errors import UserError


@dataclass(frozen=True)
class ResidentImages:
    """The table of a data set in device memory; made once and shared by the train and the meta loader."""

    images: Tensor
    """(N, H, W, 3) uint8."""
    labels: Tensor
    """(N,) int64 by sample id."""

    @classmethod
    def of(cls, data: TrainingData, device: torch.device) -> "ResidentImages":
        """Move ``data`` to ``device`` (on the CPU: share it).

        Raises:
            UserError: the images do not fit in the GPU's free memory.
        """
        needed = data.images.numel()
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if needed > free:
                raise UserError(
                    f"The images of {data.name} need {needed / 1e9:.1f} GB and {device} has {free / 1e9:.1f} GB free: "
                    "choose smaller images with --image-size, or --device cpu."
                )
        return cls(data.images.to(device), data.labels.to(device))


class ResidentLoader:
    """An endless stream of augmented batches; every epoch a new order, the last partial batch dropped."""

    def __init__(
        self,
        data: TrainingData | ResidentImages,
        ids: Tensor,
        batch_size: int,
        *,
        augment: Augmentation,
        device: torch.device,
        seed: int,
    ) -> None:
        """Set up.

        Args:
            data: where the images and labels are; hand the same ``ResidentImages`` to several loaders to share them.
            ids: (n,) int64 the samples to draw from.
            batch_size: at most n.
            augment: makes floats of bytes.
            device: where the batches are made.
            seed: of the order and the augmentation; give each loader its own.

        Raises:
            UserError: more images in a batch than there are, or padding that does not fit the images.
        """
        if batch_size > len(ids):
            raise UserError(f"A batch of {batch_size} is larger than the {len(ids)} images to draw from: lower its size.")
        self.table = data if isinstance(data, ResidentImages) else ResidentImages.of(data, device)
        augment.check(self.table.images)
        self.batch_size, self.augment = batch_size, augment
        self._ids = ids.to(device)
        self._generator = torch.Generator(device).manual_seed(seed)
        self._order = self._permutation()
        self._position = 0  # a host integer: knowing it costs no synchronisation

    def __len__(self) -> int:
        """Full batches an epoch."""
        return len(self._ids) // self.batch_size

    def __iter__(self) -> "ResidentLoader":
        return self

    def __next__(self) -> Batch:
        return self.next_batch()

    def next_batch(self) -> Batch:
        """Return the next batch; reshuffles when fewer than a batch are left. Never waits for the device."""
        if self._position + self.batch_size > len(self._ids):
            self._order, self._position = self._permutation(), 0
        ids = self._ids[self._order[self._position : self._position + self.batch_size]]
        self._position += self.batch_size
        return Batch(self.augment(self.table.images, ids, self._generator), self.table.labels[ids], ids)

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands, as CPU tensors and an integer."""
        return {
            "generator": self._generator.get_state(),
            "order": self._order.cpu().clone(),
            "position": self._position,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where the loader that wrote ``state`` stood.

        Raises:
            UserError: the state is of another training set, or of another kind of device.
        """
        if len(state["order"]) != len(self._ids):
            raise UserError(
                f"The saved run drew from {len(state['order'])} images, this one has {len(self._ids)}: "
                "continue it with the data settings it was started with."
            )
        try:
            self._generator.set_state(state["generator"].cpu())
        except RuntimeError:  # CPU and CUDA have different generators
            raise UserError(
                "The saved run drew its batches on another kind of device: resume it with the --device it was started on."
            ) from None
        self._order = state["order"].to(self._ids.device)
        self._position = int(state["position"])

    def _permutation(self) -> Tensor:
        return torch.randperm(len(self._ids), generator=self._generator, device=self._ids.device)
