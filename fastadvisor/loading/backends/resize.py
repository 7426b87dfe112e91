"""Resizing of single images with torchvision, which is the fastest on a CPU (benchmarks.decoding)."""

from torch import Tensor
from torchvision.transforms.v2 import functional as F

from fastadvisor.loading.geometry import Geometry


def resize_to_square(image: Tensor, size: int) -> Tensor:
    """Resize (3, H, W) uint8 ``image`` to (3, ``size``, ``size``), with antialiasing."""
    return F.resize(image, [size, size], antialias=True)


def resize_for_testing(image: Tensor, geometry: Geometry) -> Tensor:
    """Resize (3, H, W) uint8 ``image`` to a shorter side of ``geometry.resize``, and crop the centre to (3, S, S)."""
    across, down = geometry.resized(image.shape[-1], image.shape[-2])
    return F.center_crop(F.resize(image, [down, across], antialias=True), [geometry.size, geometry.size])
