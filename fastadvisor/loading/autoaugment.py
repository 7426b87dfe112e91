"""AutoAugment and Cutout of a whole batch at once, drawn anew for each sample (Table 2; Cubuk et al. 2019)."""

from collections.abc import Sequence
from functools import lru_cache
from math import cos, radians, sin
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn.functional import conv2d, grid_sample
from torchvision.transforms.v2 import functional as F

from fastadvisor.runtime.share import WHOLE, Share

Step = tuple[str, float, int | None]
"""The operation, its probability, and its magnitude as a number from 0 to BINS - 1 (None: it has none)."""

BINS = 10

POLICIES: dict[str, tuple[tuple[Step, Step], ...]] = {
    "cifar10": (
        (("Invert", 0.1, None), ("Contrast", 0.2, 6)),
        (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
        (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
        (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
        (("AutoContrast", 0.5, None), ("Equalize", 0.9, None)),
        (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
        (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
        (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
        (("Equalize", 0.6, None), ("Equalize", 0.5, None)),
        (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
        (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
        (("Equalize", 0.3, None), ("AutoContrast", 0.4, None)),
        (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
        (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
        (("Solarize", 0.5, 2), ("Invert", 0.0, None)),
        (("Equalize", 0.2, None), ("AutoContrast", 0.6, None)),
        (("Equalize", 0.2, None), ("Equalize", 0.6, None)),
        (("Color", 0.9, 9), ("Equalize", 0.6, None)),
        (("AutoContrast", 0.8, None), ("Solarize", 0.2, 8)),
        (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
        (("Solarize", 0.4, 5), ("AutoContrast", 0.9, None)),
        (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
        (("AutoContrast", 0.9, None), ("Solarize", 0.8, 3)),
        (("Equalize", 0.8, None), ("Invert", 0.1, None)),
        (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, None)),
    ),
    "imagenet": (
        (("Posterize", 0.4, 8), ("Rotate", 0.6, 9)),
        (("Solarize", 0.6, 5), ("AutoContrast", 0.6, None)),
        (("Equalize", 0.8, None), ("Equalize", 0.6, None)),
        (("Posterize", 0.6, 7), ("Posterize", 0.6, 6)),
        (("Equalize", 0.4, None), ("Solarize", 0.2, 4)),
        (("Equalize", 0.4, None), ("Rotate", 0.8, 8)),
        (("Solarize", 0.6, 3), ("Equalize", 0.6, None)),
        (("Posterize", 0.8, 5), ("Equalize", 1.0, None)),
        (("Rotate", 0.2, 3), ("Solarize", 0.6, 8)),
        (("Equalize", 0.6, None), ("Posterize", 0.4, 6)),
        (("Rotate", 0.8, 8), ("Color", 0.4, 0)),
        (("Rotate", 0.4, 9), ("Equalize", 0.6, None)),
        (("Equalize", 0.0, None), ("Equalize", 0.8, None)),
        (("Invert", 0.6, None), ("Equalize", 1.0, None)),
        (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
        (("Rotate", 0.8, 8), ("Color", 1.0, 2)),
        (("Color", 0.8, 8), ("Solarize", 0.8, 7)),
        (("Sharpness", 0.4, 7), ("Invert", 0.6, None)),
        (("ShearX", 0.6, 5), ("Equalize", 1.0, None)),
        (("Color", 0.4, 0), ("Equalize", 0.6, None)),
        (("Equalize", 0.4, None), ("Solarize", 0.2, 4)),
        (("Solarize", 0.6, 5), ("AutoContrast", 0.6, None)),
        (("Invert", 0.6, None), ("Equalize", 1.0, None)),
        (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
        (("Equalize", 0.8, None), ("Equalize", 0.6, None)),
    ),
}
"""The published sub-policies of two steps each, by the data set that they were learned on (as in torchvision)."""

GEOMETRIC = frozenset({"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"})
WITHOUT_SIGN = frozenset({"Posterize", "Solarize", "AutoContrast", "Equalize", "Invert"})


class Operation(NamedTuple):
    """What is done to an image. Images with equal operations are processed together."""

    name: str
    bin: int | None = None
    negative: bool = False


class AutoAugment:
    """AutoAugment with torchvision's operations, nearest-neighbour interpolation, and black where an image is moved away.

    Which operation a sample gets is drawn on the host, where it is then known without waiting for the device. So all samples
    with the same operation are processed in one call, and most operations are those of torchvision itself.
    """

    def __init__(self, policy: str) -> None:
        """Choose the policy, ``cifar10`` or ``imagenet``."""
        self.policy = POLICIES[policy]

    def __call__(self, images: Tensor, host: Generator, share: Share = WHOLE) -> Tensor:
        """Augment a batch.

        Args:
            images: (B, 3, H, W) uint8, on any device.
            host: a generator of the CPU.
            share: which part of the batch of all ranks ``images`` is.

        Returns:
            (B, 3, H, W) uint8, on the same device.
        """
        whole, mine = share.whole(len(images)), share.part(len(images))
        chosen = torch.randint(len(self.policy), (whole,), generator=host)[mine].tolist()
        applied, sign = torch.rand((2, 2, whole), generator=host)[:, :, mine].tolist()
        for number in range(2):
            operations: list[Operation | None] = []
            for sample, which in enumerate(chosen):
                name, probability, bin = self.policy[which][number]
                negative = name not in WITHOUT_SIGN and bin is not None and sign[number][sample] < 0.5
                operations.append(Operation(name, bin, negative) if applied[number][sample] < probability else None)
            images = _apply_all(images, operations)
        return images


def _apply_all(images: Tensor, operations: list[Operation | None]) -> Tensor:
    """Apply to each image its own operation; None leaves the image unchanged."""
    groups: dict[Operation | str | None, list[int]] = {}
    for row, operation in enumerate(operations):
        moves = operation is not None and operation.name in GEOMETRIC
        groups.setdefault("geometric" if moves else operation, []).append(row)
    order = torch.tensor([row for rows in groups.values() for row in rows])
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    forth, back = to_device(torch.stack([order, back]), images.device)
    parts = images[forth].split([len(rows) for rows in groups.values()])
    done = []
    for key, rows, part in zip(groups, groups.values(), parts, strict=True):
        if isinstance(key, Operation):
            done.append(_recolour(part, key))
        else:
            done.append(part if key is None else _warp(part, [one for row in rows if (one := operations[row]) is not None]))
    return torch.cat(done)[back]


def apply(images: Tensor, operation: Operation) -> Tensor:
    """Apply the same operation to all of (B, 3, H, W) uint8 ``images``."""
    return _apply_all(images, [operation] * len(images))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy ``tensor`` to ``device`` without waiting for the copy to finish."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _warp(images: Tensor, operations: Sequence[Operation]) -> Tensor:
    """Shear, translate or rotate each image by its own operation, as ``torchvision...functional.affine`` does for one image."""
    height, width = images.shape[-2:]
    inverse = torch.tensor([_inverse_matrix(operation, height, width) for operation in operations])
    inverse = to_device(inverse / torch.tensor([[width / 2], [height / 2]]), images.device)
    x, y = _pixel_positions(width, images.device), _pixel_positions(height, images.device)[:, None]
    # Not a matrix product: TF32 is too coarse for coordinates.
    a, b, c = inverse[..., None, None].unbind(dim=2)
    grid = (a * x + b * y + c).permute(0, 2, 3, 1)
    return grid_sample(images.float(), grid, mode="nearest", padding_mode="zeros", align_corners=False).to(torch.uint8)


def _inverse_matrix(operation: Operation, height: int, width: int) -> list[list[float]]:
    """Return the 2 × 3 matrix that maps a pixel to where it comes from, in pixels from the centre.

    Shears keep the upper left corner in place, as in torchvision.
    """
    by = _magnitude(operation, height, width)
    match operation.name:
        case "ShearX":
            return [[1.0, by, by * height / 2], [0.0, 1.0, 0.0]]
        case "ShearY":
            return [[1.0, 0.0, 0.0], [by, 1.0, by * width / 2]]
        case "TranslateX":
            return [[1.0, 0.0, -float(int(by))], [0.0, 1.0, 0.0]]
        case "TranslateY":
            return [[1.0, 0.0, 0.0], [0.0, 1.0, -float(int(by))]]
        case _:
            angle = radians(by)
            return [[cos(angle), -sin(angle), 0.0], [sin(angle), cos(angle), 0.0]]


@lru_cache(maxsize=32)
def _pixel_positions(side: int, device: torch.device) -> Tensor:
    """Return the position of each pixel relative to the centre, (side,) float32; the tensor is kept on the device."""
    return torch.linspace((1 - side) / 2, (side - 1) / 2, side, device=device)


def _recolour(images: Tensor, operation: Operation) -> Tensor:
    by = _magnitude(operation, 0, 0)
    match operation.name:
        case "Brightness":
            return F.adjust_brightness(images, 1 + by)
        case "Color":
            return F.adjust_saturation(images, 1 + by)
        case "Contrast":
            return F.adjust_contrast(images, 1 + by)
        case "Sharpness":
            return _adjust_sharpness(images, 1 + by)
        case "Posterize":
            return F.posterize(images, int(by))
        case "Solarize":
            return F.solarize(images, 255 * by)
        case "AutoContrast":
            return F.autocontrast(images)
        case "Equalize":
            return F.equalize(images)
        case _:
            return F.invert(images)


def _adjust_sharpness(images: Tensor, factor: float) -> Tensor:
    """Do what torchvision's does, without copying the kernel to the device each time and waiting for the copy."""
    if min(images.shape[-2:]) <= 2:
        return images
    sharp = images.float()
    blurred = conv2d(sharp, _make_blur_kernel(images.device), groups=3).round_()
    inner = sharp[..., 1:-1, 1:-1]
    inner.add_(blurred.sub_(inner), alpha=1 - factor)
    return sharp.clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=16)
def _make_blur_kernel(device: torch.device) -> Tensor:
    kernel = torch.full((3, 3), 1 / 13)
    kernel[1, 1] = 5 / 13
    return kernel.to(device).expand(3, 1, 3, 3)


def _magnitude(operation: Operation, height: int, width: int) -> float:
    """Return the signed magnitude in the unit of the operation; 0 if the operation has none."""
    if operation.bin is None:
        return 0.0
    magnitude = _magnitudes(operation.name, height, width)[operation.bin]
    return -magnitude if operation.negative else magnitude


@lru_cache(maxsize=256)
def _magnitudes(name: str, height: int, width: int) -> list[float]:
    """Return the BINS magnitudes of an operation for images of this size, as in torchvision."""
    if name == "Posterize":  # the number of bits that are kept
        return (8 - torch.arange(BINS) / ((BINS - 1) / 4)).round().tolist()
    low, high = {
        "ShearX": (0.0, 0.3),
        "ShearY": (0.0, 0.3),
        "TranslateX": (0.0, 150 / 331 * width),  # pixels
        "TranslateY": (0.0, 150 / 331 * height),
        "Rotate": (0.0, 30.0),  # degrees
        "Solarize": (1.0, 0.0),  # as a fraction of the largest pixel value
    }.get(name, (0.0, 0.9))  # difference of the factor from 1
    return torch.linspace(low, high, BINS).tolist()


def cutout(images: Tensor, size: int, generator: Generator, share: Share = WHOLE) -> Tensor:
    """Set a square of each image to 0, the mean of normalised images (DeVries & Taylor 2017).

    The centre of the square is drawn uniformly from the image, so part of the square may lie outside.

    Args:
        images: (B, 3, H, W) float32, normalised; changed in place.
        size: side of the square in pixels.
        generator: a generator of the device of ``images``.
        share: which part of the batch of all ranks ``images`` is.

    Returns:
        ``images``.
    """
    count, _, height, width = images.shape
    inside = []
    for side in (height, width):
        centre = torch.randint(side, (share.whole(count), 1), generator=generator, device=images.device)
        start = centre[share.part(count)] - size // 2
        pixels = torch.arange(side, device=images.device)
        inside.append((pixels >= start) & (pixels < start + size))
    rows, columns = inside
    return images.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0)
