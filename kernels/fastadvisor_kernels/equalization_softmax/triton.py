"""Meta Equalization Softmax in Triton. Shapes: B samples, C classes; a program has ROWS samples and BLOCK classes at a time.

A weight w = 1 − β σ(v) enters as exp(−shift) · factor with shift = β max(v, 0) and factor in [1/2, 1]: as safe from underflow
as its logarithm, without the polynomial that a softplus takes: a kernel at memory's speed cannot afford it.

- ``loss_kernel``: a row in one tile, or an online softmax over chunks of it, or over a segment of a very long one; with
  gradients too where the row is one tile.
- ``combine_kernel``: the segments' partial sums, in a fixed order (no atomics: the same bits at every run).
- ``gradient_kernel``: given the row's log-sum-exp, elementwise.
- ``reduce_kernel``: sum or mean of the losses.
"""

import triton
import triton.language as tl

from fastadvisor_kernels.arithmetic import exp, narrow, sigmoid
from fastadvisor_kernels.bernoulli.triton import bernoulli

ONE, FRACTION, ROW, CLASS, DRAWN = (tl.constexpr(kind) for kind in range(5))
"""What β is: 1; a fraction; a {0, 1} for each row; one for each row and class; drawn from a seed."""
LOWEST = tl.constexpr(-3e38)
"""Below every float32 logit, and finite: −inf − −inf would be NaN."""


@triton.jit
def weight(v, BETA: tl.constexpr, VALUE: tl.constexpr, FAST: tl.constexpr):
    """Return shift, factor, slope, curvature: w = exp(−shift) · factor, and the derivatives of log w in v. v = −inf: w = 1."""
    s, r, large = sigmoid(v, FAST)
    if BETA == FRACTION:
        factor = r + (1.0 - VALUE) * s  # 1 − β s, without cancellation
        slope = -VALUE * s * r / factor
        return tl.zeros_like(v), factor, slope, slope * (r - s) - slope * slope
    return tl.maximum(v, 0.0), large, -s, -s * r


@triton.jit
def tile_weight(
    v_ptr, beta_ptr, first_row, row, start, col, inside, is_target, V_ROW: tl.constexpr, BETA_ROW: tl.constexpr,
    BETA: tl.constexpr, VALUE: tl.constexpr, THRESHOLD: tl.constexpr, ACC: tl.constexpr, FAST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return what :func:`weight` does for a tile (ROWS, BLOCK); w = 1 at the targets and where β = 0."""
    v = tl.load(v_ptr + row.to(tl.int64)[:, None] * V_ROW + col[None, :], mask=inside, other=0.0).to(ACC)
    free = is_target
    if BETA == ROW:
        beta = tl.load(beta_ptr + row.to(tl.int64) * BETA_ROW, mask=tl.max(inside.to(tl.int32), axis=1) != 0, other=0)
        free = free | (beta == 0)[:, None]
    elif BETA == CLASS:
        beta = tl.load(beta_ptr + row.to(tl.int64)[:, None] * BETA_ROW + col[None, :], mask=inside, other=0)
        free = free | (beta == 0)
    elif BETA == DRAWN:
        free = free | (bernoulli(beta_ptr, first_row + row, start, THRESHOLD, ROWS, BLOCK) == 0)
    return weight(tl.where(free, float("-inf"), v), BETA, VALUE, FAST)


@triton.jit
def targets(y_ptr, row, rows, C: tl.constexpr, IGNORE: tl.constexpr):
    """Return y (ROWS,) int32, −1 where the label is no class; whether a row counts; whether its label is a class."""
    y = tl.load(y_ptr + row, mask=row < rows, other=0).to(tl.int64)
    counted = (row < rows) & (y != IGNORE)
    known = counted & (y >= 0) & (y < C)
    return tl.where(known, y, -1).to(tl.int32), counted, known


@triton.jit
def smoothed(is_target, SMOOTHING: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """Return the targets t = (1 − ε) [k = y] + ε / C of a tile."""
    return is_target.to(ACC) * (1.0 - SMOOTHING) + SMOOTHING / C


@triton.jit
def upstream(grad_ptr, count_ptr, row, rows, counted, known, GRAD_STEP: tl.constexpr, ACC: tl.constexpr):
    """Return the gradient of the rows' losses (ROWS, 1): 0 where a row does not count, NaN where its label is no class."""
    scale = tl.full(row.shape, 1.0, ACC)
    if grad_ptr is not None:
        scale = tl.load(grad_ptr + row.to(tl.int64) * GRAD_STEP, mask=row < rows, other=0.0).to(ACC)
    if count_ptr is not None:
        scale = scale / tl.load(count_ptr).to(ACC)
    return tl.where(counted, tl.where(known, scale, float("nan")), 0.0)[:, None]


@triton.jit(do_not_specialize=["first_row"])
def loss_kernel(
    z_ptr, v_ptr, y_ptr, beta_ptr, grad_ptr, loss_ptr, lse_ptr, part_ptr, z_grad_ptr, v_grad_ptr, rows, first_row,
    C: tl.constexpr, Z_ROW: tl.constexpr, V_ROW: tl.constexpr, BETA_ROW: tl.constexpr,
    BETA: tl.constexpr, VALUE: tl.constexpr, THRESHOLD: tl.constexpr, SMOOTHING: tl.constexpr, IGNORE: tl.constexpr,
    ACC: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    SEGMENTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    segment = tl.program_id(1)
    y, counted, known = targets(y_ptr, row, rows, C, IGNORE)
    at = z_ptr + row.to(tl.int64)[:, None] * Z_ROW
    high = tl.full((ROWS,), LOWEST, ACC)
    total = tl.zeros((ROWS,), ACC)
    z_total = tl.zeros((ROWS,), ACC)
    for chunk in range(CHUNKS):
        start = (segment * CHUNKS + chunk) * BLOCK
        col = start + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (col < C)[None, :]
        is_target = tl.arange(0, BLOCK)[None, :] == (y - start)[:, None]
        z = tl.load(at + col[None, :], mask=inside, other=0.0).to(ACC)
        x = z
        if v_ptr is not None:
            shift, factor, slope, _ = tile_weight(
                v_ptr,
                beta_ptr,
                first_row,
                row,
                start,
                col,
                inside,
                is_target,
                V_ROW,
                BETA_ROW,
                BETA,
                VALUE,
                THRESHOLD,
                ACC,
                FAST,
                ROWS,
                BLOCK,
            )
            x = z - shift
        if C % (BLOCK * CHUNKS * SEGMENTS) != 0:
            x = tl.where((col < C)[None, :], x, float("-inf"))
        higher = tl.maximum(high, tl.max(x, axis=1))
        e = exp(x - higher[:, None], FAST)
        if v_ptr is not None:
            e = e * factor
        total = total * tl.exp(high - higher) + tl.sum(e, axis=1)
        high = higher
        if SMOOTHING != 0:
            z_total += tl.sum(z, axis=1)
        if z_grad_ptr is not None:  # the row is this one tile
            p = e * (1.0 / total)[:, None]
            scale = upstream(grad_ptr, None, row, rows, counted, known, 1, ACC)
            out = row.to(tl.int64)[:, None] * C + col[None, :]
            tl.store(z_grad_ptr + out, narrow(scale * (p - smoothed(is_target, SMOOTHING, C, ACC)), z_grad_ptr), mask=inside)
            if v_grad_ptr is not None:
                tl.store(v_grad_ptr + out, narrow(scale * p * slope, v_grad_ptr), mask=inside)
    if SEGMENTS == 1:
        z_y = tl.load(z_ptr + row.to(tl.int64) * Z_ROW + y, mask=known, other=0.0).to(ACC)
        store_loss(loss_ptr, lse_ptr, row, rows, counted, known, high, total, z_y, z_total, SMOOTHING, C)
    else:
        out = part_ptr + (row.to(tl.int64) * SEGMENTS + segment) * 3
        tl.store(out, high, mask=row < rows)
        tl.store(out + 1, total, mask=row < rows)
        tl.store(out + 2, z_total, mask=row < rows)


@triton.jit
def store_loss(
    loss_ptr, lse_ptr, row, rows, counted, known, high, total, z_y, z_total, SMOOTHING: tl.constexpr, C: tl.constexpr
):
    """Write loss and log-sum-exp. Differences to the maximum first, which are exact: z_y may be a thousand times the loss."""
    loss = (1.0 - SMOOTHING) * (high - z_y) + tl.log(total)
    if SMOOTHING != 0:
        loss += SMOOTHING * (high - z_total / C)
    else:
        loss = tl.where(loss < 0, 0.0, loss)  # rounding; a NaN stays
    loss = tl.where(counted, tl.where(known, loss, float("nan")), 0.0)
    tl.store(loss_ptr + row, loss, mask=row < rows)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, high + tl.log(total), mask=row < rows)


@triton.jit
def combine_kernel(
    z_ptr, y_ptr, part_ptr, loss_ptr, lse_ptr, rows,
    C: tl.constexpr, Z_ROW: tl.constexpr, SMOOTHING: tl.constexpr, IGNORE: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    y, counted, known = targets(y_ptr, row, rows, C, IGNORE)
    segment = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (segment < SEGMENTS)[None, :]
    at = part_ptr + (row.to(tl.int64)[:, None] * SEGMENTS + segment[None, :]) * 3
    highs = tl.load(at, mask=inside, other=LOWEST)
    high = tl.max(highs, axis=1)
    total = tl.sum(tl.load(at + 1, mask=inside, other=0.0) * tl.exp(highs - high[:, None]), axis=1)
    z_total = tl.sum(tl.load(at + 2, mask=inside, other=0.0), axis=1)
    z_y = tl.load(z_ptr + row.to(tl.int64) * Z_ROW + y, mask=known, other=0.0).to(ACC)
    store_loss(loss_ptr, lse_ptr, row, rows, counted, known, high, total, z_y, z_total, SMOOTHING, C)


@triton.jit(do_not_specialize=["first_row"])
def gradient_kernel(
    z_ptr, v_ptr, y_ptr, beta_ptr, grad_ptr, count_ptr, lse_ptr, z_grad_ptr, v_grad_ptr, rows, first_row,
    C: tl.constexpr, Z_ROW: tl.constexpr, V_ROW: tl.constexpr, BETA_ROW: tl.constexpr, GRAD_STEP: tl.constexpr,
    BETA: tl.constexpr, VALUE: tl.constexpr, THRESHOLD: tl.constexpr, SMOOTHING: tl.constexpr, IGNORE: tl.constexpr,
    ACC: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * BLOCK
    col = start + tl.arange(0, BLOCK)
    y, counted, known = targets(y_ptr, row, rows, C, IGNORE)
    inside = (row < rows)[:, None] & (col < C)[None, :]
    is_target = tl.arange(0, BLOCK)[None, :] == (y - start)[:, None]
    z = tl.load(z_ptr + row.to(tl.int64)[:, None] * Z_ROW + col[None, :], mask=inside, other=0.0).to(ACC)
    lse = tl.load(lse_ptr + row, mask=row < rows, other=0.0)[:, None]
    if v_ptr is None:
        p = exp(z - lse, FAST)
    else:
        shift, factor, slope, _ = tile_weight(
            v_ptr,
            beta_ptr,
            first_row,
            row,
            start,
            col,
            inside,
            is_target,
            V_ROW,
            BETA_ROW,
            BETA,
            VALUE,
            THRESHOLD,
            ACC,
            FAST,
            ROWS,
            BLOCK,
        )
        p = factor * exp(z - shift - lse, FAST)
    scale = upstream(grad_ptr, count_ptr, row, rows, counted, known, GRAD_STEP, ACC)
    out = row.to(tl.int64)[:, None] * C + col[None, :]
    if z_grad_ptr is not None:
        tl.store(z_grad_ptr + out, narrow(scale * (p - smoothed(is_target, SMOOTHING, C, ACC)), z_grad_ptr), mask=inside)
    if v_grad_ptr is not None:
        tl.store(v_grad_ptr + out, narrow(scale * p * slope, v_grad_ptr), mask=inside)


@triton.jit
def reduce_kernel(
    loss_ptr, y_ptr, out_ptr, count_ptr, rows,
    IGNORE: tl.constexpr, MEAN: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((BLOCK,), ACC)
    counted = tl.zeros((BLOCK,), ACC)
    for chunk in range(CHUNKS):
        row = chunk * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(loss_ptr + row, mask=row < rows, other=0.0)
        if MEAN:
            y = tl.load(y_ptr + row, mask=row < rows, other=0).to(tl.int64)
            counted += ((row < rows) & (y != IGNORE)).to(ACC)
    result = tl.sum(total, axis=0)
    if MEAN:
        count = tl.sum(counted, axis=0)
        tl.store(count_ptr, count)
        result = result / count
    tl.store(out_ptr, result)
