"""torchvision's resizing of single images, which is the quickest there is on a CPU (benchmarks.decoding)."""

from torch import Tensor
from torchvision.transforms.v2 import functional as F

from fastadvisor.loading.geometry import Geometry


def resize_to_square(image: Tensor, size: int) -> Tensor:
    """Return (3, H, W) uint8 ``image`` brought to (3, ``size``, ``size``), antialiased."""
    return F.resize(image, [size, size], antialias=True)


def resize_for_testing(image: Tensor, geometry: Geometry) -> Tensor:
    """Return (3, H, W) uint8 ``image`` as (3, S, S): the shorter side brought to ``geometry.resize``, the centre cut out."""
    across, down = geometry.resized(image.shape[-1], image.shape[-2])
    return F.center_crop(F.resize(image, [down, across], antialias=True), [geometry.size, geometry.size])
