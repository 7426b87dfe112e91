"""Augmentation of a whole batch at once, on the device, drawn anew for each sample: pad, crop, mirror, normalise."""

from functools import lru_cache

import torch
from torch import Generator, Tensor

from fastadvisor.datasets.types import Triple
from fastadvisor.errors import UserError
from fastadvisor.loading.autoaugment import AutoAugment, cutout
from fastadvisor.runtime.share import WHOLE, Share


class Augmentation:
    """Random crop of the reflect-padded image, random mirror, AutoAugment, normalisation, Cutout (method.md, "Augmentation").

    The crop is computed by indices into the unpadded images: a padded copy, 1.6 times the size of a CIFAR batch, is never made.
    """

    def __init__(
        self, padding: int, flip: bool, mean: Triple, std: Triple, policy: AutoAugment | None = None, hole: int = 0
    ) -> None:
        """Set up.

        Args:
            padding: width in pixels of the reflected border; 0 for no crop.
            flip: whether each image is mirrored with probability 1/2.
            mean: of each channel, for pixels scaled to 0..1.
            std: likewise, the standard deviation.
            policy: AutoAugment; None for none.
            hole: side in pixels of the square that Cutout removes; 0 for none.
        """
        self.padding, self.flip, self.mean, self.std, self.policy, self.hole = padding, flip, mean, std, policy, hole

    def check(self, images: Tensor) -> None:
        """Raise a UserError if the padding does not fit (N, H, W, 3) ``images``."""
        self.check_side(min(images.shape[1], images.shape[2]))

    def check_side(self, side: int) -> None:
        """Raise a UserError if the padding does not fit images whose shorter side is ``side`` pixels."""
        if self.padding >= side:
            raise UserError(f"--crop-padding {self.padding} is too large for images of {side} pixels: use at most {side - 1}.")

    def __call__(
        self, images: Tensor, ids: Tensor, generator: Generator, host: Generator | None = None, share: Share = WHOLE
    ) -> Tensor:
        """Take the samples ``ids`` out of ``images`` and augment them.

        Args:
            images: (N, H, W, 3) uint8.
            ids: (B,) int64 rows of ``images``, on the same device.
            generator: a generator of that device.
            host: a generator of the CPU, for AutoAugment; None: ``generator``, which must then be one of the CPU.
            share: which part of the batch of all ranks ``ids`` is. If their generators are in the same state, all ranks
                together get exactly what one process with the whole batch would.

        Returns:
            (B, 3, H, W) float32, contiguous.

        Raises:
            UserError: the padding does not fit the images.
        """
        self.check(images)
        height, width = images.shape[1:3]
        count, device = ids.shape[0], ids.device
        whole, mine = share.whole(count), share.part(count)
        rows = torch.arange(height, device=device).expand(count, height)
        columns = torch.arange(width, device=device).expand(count, width)
        if self.flip:
            mirror = torch.rand((whole, 1), generator=generator, device=device)[mine] < 0.5
            columns = torch.where(mirror, width - 1 - columns, columns)
        if self.padding:
            shift = torch.randint(-self.padding, self.padding + 1, (2, whole, 1), generator=generator, device=device)[:, mine]
            rows, columns = _reflect(rows + shift[0], height), _reflect(columns + shift[1], width)
        batch = images[ids[:, None, None], rows[:, :, None], columns[:, None, :]]
        if self.policy is not None:
            host = generator if host is None else host
            batch = self.policy(batch.permute(0, 3, 1, 2), host, share).permute(0, 2, 3, 1)
        batch = normalize(batch, self.mean, self.std)
        return cutout(batch, self.hole, generator, share) if self.hole else batch


def normalize(images: Tensor, mean: Triple, std: Triple) -> Tensor:
    """Return (B, H, W, 3) uint8 ``images`` as (B, 3, H, W) float32: scaled to 0..1, minus ``mean``, divided by ``std``."""
    scale, offset = _scale_and_offset(mean, std, images.device)
    planes = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return planes.mul_(scale).add_(offset)


@lru_cache(maxsize=16)
def _scale_and_offset(mean: Triple, std: Triple, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return scale and offset, each (3, 1, 1) float32. They are kept: copying them in every step would stall the device."""
    scale = [1 / (255 * deviation) for deviation in std]
    offset = [-average / deviation for average, deviation in zip(mean, std, strict=True)]
    return (
        torch.tensor(scale, dtype=torch.float32, device=device).view(3, 1, 1),
        torch.tensor(offset, dtype=torch.float32, device=device).view(3, 1, 1),
    )


def _reflect(index: Tensor, size: int) -> Tensor:
    """Reflect positions from -size+1 to 2*size-2 into 0..size-1; the border pixel is not repeated."""
    return (size - 1) - ((size - 1) - index.abs()).abs()
