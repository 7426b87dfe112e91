"""A candidate, not yet kept: the advisor's output layer with bias, sigmoid and re-weighting in one kernel.

h = f ⊙ σ(E Wᵀ + b), u = E Wᵀ + b stored for the backward pass, which stays as it is. It would spare a launch, and reading u
once. Whether that outweighs a matrix product that is not cuBLAS's has to be measured: ``python -m benchmarks.kernels --tune``
on a GPU does.
Shapes: B samples, K embedding (200), D features.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.kernels import timing
from fastadvisor_kernels import reweight_features
from fastadvisor_kernels.launch import Launch, ceil_div

BLOCK_B, BLOCK_D, BLOCK_K = 32, 64, 32


@triton.jit  # type: ignore[untyped-decorator]
def masked_linear_kernel(  # type: ignore[no-untyped-def] # noqa: ANN201
    e_ptr, w_ptr, b_ptr, f_ptr, u_ptr, h_ptr, rows,  # noqa: ANN001
    K: tl.constexpr, D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write u and h, a tile (BLOCK_B, BLOCK_D) a program."""
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        e = tl.load(e_ptr + row[:, None] * K + k[None, :], mask=(row < rows)[:, None] & (k < K)[None, :], other=0.0)
        w = tl.load(w_ptr + col[None, :] * K + k[:, None], mask=(col < D)[None, :] & (k < K)[:, None], other=0.0)
        total += tl.dot(e, w, input_precision="ieee")
    u = total + tl.load(b_ptr + col, mask=col < D, other=0.0)[None, :]
    at = row.to(tl.int64)[:, None] * D + col[None, :]
    inside = (row < rows)[:, None] & (col < D)[None, :]
    f = tl.load(f_ptr + at, mask=inside, other=0.0)
    tl.store(u_ptr + at, u, mask=inside)
    tl.store(h_ptr + at, f * tl.sigmoid(u), mask=inside)


def plan_masked_linear(e: Tensor, weight: Tensor, bias: Tensor, f: Tensor) -> tuple[Launch, Tensor, Tensor]:
    """Return the launch, u and h, all float32 and contiguous."""
    u, h = torch.empty_like(f), torch.empty_like(f)
    (rows, width), features = e.shape, len(weight)
    arguments = {"e_ptr": e, "w_ptr": weight, "b_ptr": bias, "f_ptr": f, "u_ptr": u, "h_ptr": h, "rows": rows}
    sizes = {"K": width, "D": features, "BLOCK_B": BLOCK_B, "BLOCK_D": BLOCK_D, "BLOCK_K": BLOCK_K}
    return Launch(masked_linear_kernel, (ceil_div(rows, BLOCK_B), ceil_div(features, BLOCK_D)), arguments | sizes), u, h


def make(batch: int, features: int, device: torch.device, width: int = 200) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return E, W, b, f."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = (batch, width), (features, width), (features,), (batch, features)
    e, weight, bias, f = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
    return e, weight / width**0.5, bias, f


def measure(device: torch.device, rounds: int, flush: timing.Flush) -> list[dict[str, Any]]:
    """Return microseconds of both ways at the sizes of CIFAR's and ImageNet's networks."""
    found = []
    for batch, features in ((128, 64), (128, 512), (512, 512), (64, 2048)):
        e, weight, bias, f = make(batch, features, device)
        launch, _, h = plan_masked_linear(e, weight, bias, f)
        launch.run()
        expected = reweight_features(f, linear(e, weight, bias))
        if not torch.allclose(h, expected, rtol=1e-4, atol=1e-4):
            raise SystemExit("The epilogue is wrong, so it is not timed.")
        separate = partial(_separate, e, weight, bias, f)
        times = timing.on_device({"epilogue": launch.run, "separate": separate}, rounds, flush)
        found.append({"batch": batch, "features": features, **times})
    return found


def _separate(e: Tensor, weight: Tensor, bias: Tensor, f: Tensor) -> Tensor:
    return reweight_features(f, linear(e, weight, bias))
