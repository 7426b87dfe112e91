"""Losses are computed in float32 or wider: half precision is not accurate enough for a softmax."""

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Return ``values`` in float32, or unchanged if their dtype is wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
