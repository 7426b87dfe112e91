"""A kernel with its arguments: launched here, or compiled ahead of time by the tests."""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """One launch of a Triton kernel."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """By name: tensors, numbers, and the values of ``tl.constexpr`` parameters."""
    warps: int = 4

    def run(self) -> None:
        """Launch the kernel on the current stream of the tensors' device, without waiting for it."""
        if 0 not in self.grid:
            device = next(value.device for value in self.arguments.values() if isinstance(value, Tensor))
            with _current(device):
                self.kernel[self.grid](**self.arguments, num_warps=self.warps)


def run(launches: list[Launch]) -> None:
    """Launch all kernels in order."""
    for launch in launches:
        launch.run()


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever device the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype to compute in: float64 where one of them is, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def fast_math(dtype: torch.dtype) -> bool:
    """Return whether kernels that compute in ``dtype`` may use NVIDIA's own instructions: neither interpreted nor on AMD."""
    return dtype == torch.float32 and torch.version.hip is None and os.environ.get("TRITON_INTERPRET") != "1"


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(n: int, size: int) -> int:
    """Return how many blocks of ``size`` hold ``n``."""
    return -(-n // size)
