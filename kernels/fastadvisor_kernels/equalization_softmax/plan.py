"""Which launches an operation takes: tiles, arguments and outputs. Shapes: B samples, C classes."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastadvisor_kernels.arithmetic import ACC
from fastadvisor_kernels.bernoulli import Bernoulli
from fastadvisor_kernels.equalization_softmax.flat import FlatBeta, Options
from fastadvisor_kernels.equalization_softmax.reference import is_binary
from fastadvisor_kernels.equalization_softmax.triton import (
    CLASS,
    DRAWN,
    FRACTION,
    ONE,
    ROW,
    combine_kernel,
    gradient_kernel,
    loss_kernel,
    reduce_kernel,
)
from fastadvisor_kernels.launch import Launch, ceil_div, compute_dtype, fast_math, power_of_two

PROGRAMS = 1024
"""Long rows are cut into segments until there are this many programs: about eight for each multiprocessor of an H100. A
constant, so that the order of summation is the same on every GPU."""


class Tile(NamedTuple):
    """The part of a matrix (rows, classes) that one program computes."""

    rows: int
    block: int
    warps: int
    chunks: int = 1
    """Blocks in a row, one after the other."""
    segments: int = 1
    """Programs that share a row."""


def loss_tile(rows: int, classes: int, dtype: torch.dtype) -> Tile:
    """Return the tile of a pass that sums over the classes: sixteen elements a thread, eight in float64 (more would spill).

    A table, not an autotuner, which would wait for the device at its first call and could not be captured in a CUDA graph.
    ``python -m benchmarks.kernels --tune`` measures its neighbours.
    """
    largest, each = (1024, 8) if dtype == torch.float64 else (4096, 16)
    block = max(16, power_of_two(classes))
    if block <= largest:
        return Tile(max(1, 1024 // block), block, max(block, 1024) // (32 * each))
    pieces = ceil_div(classes, largest)
    segments = min(pieces, power_of_two(ceil_div(PROGRAMS, max(rows, 1))))
    chunks = ceil_div(pieces, segments)
    return Tile(1, largest, largest // (32 * each), chunks, ceil_div(pieces, chunks))


def gradient_tile(classes: int, dtype: torch.dtype) -> Tile:
    """Return the tile of an elementwise pass: sixteen elements a thread, four in float64."""
    largest = 512 if dtype == torch.float64 else 2048
    block = min(max(16, power_of_two(classes)), largest)
    return Tile(largest // block, block, 4)


def beta_arguments(beta: FlatBeta, v: Tensor | None, accumulator: torch.dtype) -> dict[str, object]:
    """Return the kernel arguments that say what β is."""
    tensor, kind, stride, threshold = None, ONE, 0, 0
    if v is None:
        pass
    elif beta.seed is not None:
        tensor, kind, threshold = beta.seed, DRAWN, Bernoulli(beta.value, beta.seed).threshold
    elif beta.mask is not None:
        kind = ROW if beta.mask.shape[1] == 1 else CLASS
        tensor = dense_rows(beta.mask)
        stride = 0 if tensor.shape[0] == 1 else tensor.stride(0)
    elif not is_binary(beta.value, accumulator):
        kind = FRACTION
    return {
        "beta_ptr": tensor, "first_row": beta.first_row,
        "BETA": kind.value, "BETA_ROW": stride, "VALUE": beta.value, "THRESHOLD": threshold,
    }  # fmt: skip


def grad_step(grad: Tensor) -> int:
    """Return the stride between the gradients of the rows: 0 if all rows share one."""
    return 0 if grad.dim() == 0 else grad.stride(0)


def dense_rows(tensor: Tensor) -> Tensor:
    """Return ``tensor`` (B, C), copied unless neighbours in a row are neighbours in memory."""
    return tensor if tensor.shape[1] == 1 or tensor.stride(1) == 1 else tensor.contiguous()


class LossPlan(NamedTuple):
    """The launches of an operation and the outputs that they write."""

    launches: list[Launch]
    loss: Tensor
    """(B,), or () after a reduction."""
    lse: Tensor | None
    """(B,) log-sum-exp of z + a."""
    counted: Tensor | None
    """(1,) samples that the mean is over."""
    z_grad: Tensor | None = None
    v_grad: Tensor | None = None


def plan_loss(z: Tensor, v: Tensor | None, y: Tensor, beta: FlatBeta, options: Options) -> LossPlan:
    """Return the launches for the loss and what the gradients need of it: one where a row fits a tile, else two.

    A reduction is one more.
    """
    (rows, classes), dtype = z.shape, compute_dtype(z, v)
    tile = loss_tile(rows, classes, dtype)
    loss, lse = z.new_empty(rows, dtype=dtype), z.new_empty(rows, dtype=dtype)
    launches = _loss_launches(z, v, y, beta, options, tile, loss, lse)
    if options.reduction == "none":
        return LossPlan(launches, loss, lse, None)
    launch, total, count = reduction_launch(loss, y, options)
    return LossPlan([*launches, launch], total, lse, count)


def plan_loss_and_gradients(
    z: Tensor, v: Tensor | None, y: Tensor, beta: FlatBeta, options: Options, grad: Tensor | None, *, of_v: bool
) -> LossPlan:
    """Return the launches for the loss of each row and its gradients times ``grad``: one where a row fits a tile."""
    (rows, classes), dtype = z.shape, compute_dtype(z, v)
    tile = loss_tile(rows, classes, dtype)
    loss, z_grad = z.new_empty(rows, dtype=dtype), z.new_empty(z.shape)
    v_grad = None if v is None or not of_v else v.new_empty(v.shape)
    if tile.chunks * tile.segments == 1:
        launches = _loss_launches(z, v, y, beta, options, tile, loss, None, grad, z_grad, v_grad)
        return LossPlan(launches, loss, None, None, z_grad, v_grad)
    lse = z.new_empty(rows, dtype=dtype)
    launches = _loss_launches(z, v, y, beta, options, tile, loss, lse)
    if grad is None:
        grad = z.new_ones((), dtype=dtype)
    launches.append(_gradient_launch(z, v, y, beta, options, grad, None, lse, z_grad, v_grad))
    return LossPlan(launches, loss, lse, None, z_grad, v_grad)


def plan_gradients(
    grad: Tensor, z: Tensor, v: Tensor | None, y: Tensor, lse: Tensor, count: Tensor | None, beta: FlatBeta, options: Options,
    *, of_z: bool, of_v: bool,
) -> tuple[list[Launch], Tensor | None, Tensor | None]:  # fmt: skip
    """Return the one launch for the gradients of z and v, and these."""
    z_grad = z.new_empty(z.shape) if of_z else None
    v_grad = v.new_empty(v.shape) if of_v and v is not None else None
    launches = [] if z_grad is None and v_grad is None else [
        _gradient_launch(z, v, y, beta, options, grad, count, lse, z_grad, v_grad)
    ]  # fmt: skip
    return launches, z_grad, v_grad


def reduction_launch(loss: Tensor, y: Tensor, options: Options) -> tuple[Launch, Tensor, Tensor | None]:
    """Return the launch that reduces losses (B,), the result (), and for a mean the number of samples in it (1,)."""
    total, count = loss.new_empty(()), loss.new_empty(1) if options.reduction == "mean" else None
    arguments = {"loss_ptr": loss, "y_ptr": y.contiguous(), "out_ptr": total, "count_ptr": count, "rows": len(loss)}
    constants = {"IGNORE": options.ignore_index, "MEAN": count is not None, "ACC": ACC[loss.dtype]}
    sizes = {"BLOCK": 1024, "CHUNKS": ceil_div(len(loss), 1024)}
    return Launch(reduce_kernel, (1,), arguments | constants | sizes), total, count


def _loss_launches(
    z: Tensor, v: Tensor | None, y: Tensor, beta: FlatBeta, options: Options, tile: Tile, loss: Tensor, lse: Tensor | None,
    grad: Tensor | None = None, z_grad: Tensor | None = None, v_grad: Tensor | None = None,
) -> list[Launch]:  # fmt: skip
    (rows, classes), dtype = z.shape, loss.dtype
    z, v, y = dense_rows(z), None if v is None else dense_rows(v), y.contiguous()
    part = z.new_empty((rows, tile.segments, 3), dtype=dtype) if tile.segments > 1 else None
    shared = {
        "z_ptr": z, "y_ptr": y, "loss_ptr": loss, "lse_ptr": lse, "part_ptr": part, "rows": rows,
        "C": classes, "Z_ROW": z.stride(0), "SMOOTHING": options.label_smoothing, "IGNORE": options.ignore_index,
        "ACC": ACC[dtype], "SEGMENTS": tile.segments,
    }  # fmt: skip
    own = {
        "v_ptr": v, "V_ROW": 0 if v is None else v.stride(0), **beta_arguments(beta, v, dtype),
        "grad_ptr": None if grad is None else grad.contiguous(), "z_grad_ptr": z_grad, "v_grad_ptr": v_grad,
        "ROWS": tile.rows, "BLOCK": tile.block, "CHUNKS": tile.chunks, "FAST": fast_math(dtype),
    }  # fmt: skip
    launches = [Launch(loss_kernel, (ceil_div(rows, tile.rows), tile.segments), shared | own, tile.warps)]
    if tile.segments > 1:
        block = power_of_two(tile.segments)
        height = max(1, 256 // block)
        launches.append(Launch(combine_kernel, (ceil_div(rows, height),), shared | {"ROWS": height, "BLOCK": block}))
    return launches


def _gradient_launch(
    z: Tensor, v: Tensor | None, y: Tensor, beta: FlatBeta, options: Options, grad: Tensor, count: Tensor | None, lse: Tensor,
    z_grad: Tensor | None, v_grad: Tensor | None,
) -> Launch:  # fmt: skip
    rows, classes = z.shape
    tile = gradient_tile(classes, lse.dtype)
    z, v, y = dense_rows(z), None if v is None else dense_rows(v), y.contiguous()
    arguments = {
        "z_ptr": z, "v_ptr": v, "y_ptr": y, "grad_ptr": grad, "count_ptr": count, "lse_ptr": lse,
        "z_grad_ptr": z_grad, "v_grad_ptr": v_grad, "rows": rows,
        "C": classes, "Z_ROW": z.stride(0), "V_ROW": 0 if v is None else v.stride(0), **beta_arguments(beta, v, lse.dtype),
        "GRAD_STEP": grad_step(grad), "SMOOTHING": options.label_smoothing, "IGNORE": options.ignore_index,
        "ACC": ACC[lse.dtype], "FAST": fast_math(lse.dtype), "ROWS": tile.rows, "BLOCK": tile.block,
    }  # fmt: skip
    return Launch(gradient_kernel, (ceil_div(rows, tile.rows), ceil_div(classes, tile.block)), arguments, tile.warps)
