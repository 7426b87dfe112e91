"""The loss's derivative along a direction, in Triton. Shapes: B samples, C classes; tiles as in equalization_softmax/triton.py.

With q = ż + (∂a/∂v) v̇ and p̃ = softmax(z + a): L̇ = Σ_k p̃_k q_k − Σ_k t_k ż_k. The row's sums Σ e^{z+a} and Σ e^{z+a} q are found
together, in one pass and online.
"""

import triton
import triton.language as tl

from fastadvisor_kernels.arithmetic import exp, narrow
from fastadvisor_kernels.equalization_softmax.triton import LOWEST, smoothed, targets, tile_weight, upstream


@triton.jit(do_not_specialize=["first_row"])
def tangent_kernel(
    z_ptr, z_dot_ptr, v_ptr, v_dot_ptr, y_ptr, beta_ptr, loss_ptr, lse_ptr, mean_ptr, part_ptr, rows, first_row,
    C: tl.constexpr, Z_ROW: tl.constexpr, Z_DOT_ROW: tl.constexpr, V_ROW: tl.constexpr, V_DOT_ROW: tl.constexpr,
    BETA_ROW: tl.constexpr, BETA: tl.constexpr, VALUE: tl.constexpr, THRESHOLD: tl.constexpr, SMOOTHING: tl.constexpr,
    IGNORE: tl.constexpr, ACC: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    segment = tl.program_id(1)
    y, counted, known = targets(y_ptr, row, rows, C, IGNORE)
    wide = row.to(tl.int64)[:, None]
    high = tl.full((ROWS,), LOWEST, ACC)
    total = tl.zeros((ROWS,), ACC)
    weighted = tl.zeros((ROWS,), ACC)
    z_dot_total = tl.zeros((ROWS,), ACC)
    for chunk in range(CHUNKS):
        start = (segment * CHUNKS + chunk) * BLOCK
        col = start + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (col < C)[None, :]
        is_target = tl.arange(0, BLOCK)[None, :] == (y - start)[:, None]
        x = tl.load(z_ptr + wide * Z_ROW + col[None, :], mask=inside, other=0.0).to(ACC)
        z_dot = tl.load(z_dot_ptr + wide * Z_DOT_ROW + col[None, :], mask=inside, other=0.0).to(ACC)
        q = z_dot
        if v_ptr is not None:
            shift, factor, slope, _ = tile_weight(
                v_ptr, beta_ptr, first_row, row, start, col, inside, is_target, V_ROW, BETA_ROW, BETA, VALUE, THRESHOLD,
                ACC, FAST, ROWS, BLOCK,
            )  # fmt: skip
            x -= shift
            if v_dot_ptr is not None:
                q += slope * tl.load(v_dot_ptr + wide * V_DOT_ROW + col[None, :], mask=inside, other=0.0).to(ACC)
        if C % (BLOCK * CHUNKS * SEGMENTS) != 0:
            x = tl.where((col < C)[None, :], x, float("-inf"))
        higher = tl.maximum(high, tl.max(x, axis=1))
        e = exp(x - higher[:, None], FAST)
        if v_ptr is not None:
            e = e * factor
        smaller = tl.exp(high - higher)
        total = total * smaller + tl.sum(e, axis=1)
        weighted = weighted * smaller + tl.sum(e * q, axis=1)
        high = higher
        if SMOOTHING != 0:
            z_dot_total += tl.sum(z_dot, axis=1)
    if SEGMENTS == 1:
        z_dot_y = tl.load(z_dot_ptr + row.to(tl.int64) * Z_DOT_ROW + y, mask=known, other=0.0).to(ACC)
        store_tangent(
            loss_ptr, lse_ptr, mean_ptr, row, rows, counted, known, high, total, weighted, z_dot_y, z_dot_total, SMOOTHING, C
        )
    else:
        out = part_ptr + (row.to(tl.int64) * SEGMENTS + segment) * 4
        tl.store(out, high, mask=row < rows)
        tl.store(out + 1, total, mask=row < rows)
        tl.store(out + 2, weighted, mask=row < rows)
        tl.store(out + 3, z_dot_total, mask=row < rows)


@triton.jit
def store_tangent(
    loss_ptr, lse_ptr, mean_ptr, row, rows, counted, known, high, total, weighted, z_dot_y, z_dot_total,
    SMOOTHING: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Write L̇, the log-sum-exp of z + a, and the mean of q under p̃."""
    mean = weighted / total
    loss = mean - (1.0 - SMOOTHING) * z_dot_y
    if SMOOTHING != 0:
        loss -= SMOOTHING * z_dot_total / C
    loss = tl.where(counted, tl.where(known, loss, float("nan")), 0.0)
    tl.store(loss_ptr + row, loss, mask=row < rows)
    tl.store(lse_ptr + row, high + tl.log(total), mask=row < rows)
    tl.store(mean_ptr + row, mean, mask=row < rows)


@triton.jit
def combine_tangent_kernel(
    z_dot_ptr, y_ptr, part_ptr, loss_ptr, lse_ptr, mean_ptr, rows,
    C: tl.constexpr, Z_DOT_ROW: tl.constexpr, SMOOTHING: tl.constexpr, IGNORE: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    y, counted, known = targets(y_ptr, row, rows, C, IGNORE)
    segment = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (segment < SEGMENTS)[None, :]
    at = part_ptr + (row.to(tl.int64)[:, None] * SEGMENTS + segment[None, :]) * 4
    highs = tl.load(at, mask=inside, other=LOWEST)
    high = tl.max(highs, axis=1)
    smaller = tl.exp(highs - high[:, None])
    total = tl.sum(tl.load(at + 1, mask=inside, other=0.0) * smaller, axis=1)
    weighted = tl.sum(tl.load(at + 2, mask=inside, other=0.0) * smaller, axis=1)
    z_dot_total = tl.sum(tl.load(at + 3, mask=inside, other=0.0), axis=1)
    z_dot_y = tl.load(z_dot_ptr + row.to(tl.int64) * Z_DOT_ROW + y, mask=known, other=0.0).to(ACC)
    store_tangent(
        loss_ptr, lse_ptr, mean_ptr, row, rows, counted, known, high, total, weighted, z_dot_y, z_dot_total, SMOOTHING, C
    )


@triton.jit(do_not_specialize=["first_row"])
def tangent_gradient_kernel(
    z_ptr, z_dot_ptr, v_ptr, v_dot_ptr, y_ptr, beta_ptr, grad_ptr, count_ptr, lse_ptr, mean_ptr,
    z_grad_ptr, z_dot_grad_ptr, v_grad_ptr, v_dot_grad_ptr, rows, first_row,
    C: tl.constexpr, Z_ROW: tl.constexpr, Z_DOT_ROW: tl.constexpr, V_ROW: tl.constexpr, V_DOT_ROW: tl.constexpr,
    BETA_ROW: tl.constexpr, GRAD_STEP: tl.constexpr, BETA: tl.constexpr, VALUE: tl.constexpr, THRESHOLD: tl.constexpr,
    SMOOTHING: tl.constexpr, IGNORE: tl.constexpr, ACC: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * BLOCK
    col = start + tl.arange(0, BLOCK)
    y, counted, known = targets(y_ptr, row, rows, C, IGNORE)
    wide = row.to(tl.int64)[:, None]
    inside = (row < rows)[:, None] & (col < C)[None, :]
    is_target = tl.arange(0, BLOCK)[None, :] == (y - start)[:, None]
    z = tl.load(z_ptr + wide * Z_ROW + col[None, :], mask=inside, other=0.0).to(ACC)
    q = tl.load(z_dot_ptr + wide * Z_DOT_ROW + col[None, :], mask=inside, other=0.0).to(ACC)
    lse = tl.load(lse_ptr + row, mask=row < rows, other=0.0)[:, None]
    if v_ptr is None:
        p = exp(z - lse, FAST)
    else:
        shift, factor, slope, curvature = tile_weight(
            v_ptr, beta_ptr, first_row, row, start, col, inside, is_target, V_ROW, BETA_ROW, BETA, VALUE, THRESHOLD,
            ACC, FAST, ROWS, BLOCK,
        )  # fmt: skip
        p = factor * exp(z - shift - lse, FAST)
        if v_dot_ptr is not None:
            v_dot = tl.load(v_dot_ptr + wide * V_DOT_ROW + col[None, :], mask=inside, other=0.0).to(ACC)
            q += slope * v_dot
    scale = upstream(grad_ptr, count_ptr, row, rows, counted, known, GRAD_STEP, ACC)
    p *= scale
    pull = p * (q - tl.load(mean_ptr + row, mask=row < rows, other=0.0)[:, None])
    out = wide * C + col[None, :]
    if z_grad_ptr is not None:
        tl.store(z_grad_ptr + out, narrow(pull, z_grad_ptr), mask=inside)
    if z_dot_grad_ptr is not None:
        tl.store(z_dot_grad_ptr + out, narrow(p - scale * smoothed(is_target, SMOOTHING, C, ACC), z_dot_grad_ptr), mask=inside)
    if v_grad_ptr is not None:
        v_grad = slope * pull
        if v_dot_ptr is not None:
            v_grad += p * curvature * v_dot
        tl.store(v_grad_ptr + out, narrow(v_grad, v_grad_ptr), mask=inside)
    if v_dot_grad_ptr is not None:
        tl.store(v_dot_grad_ptr + out, narrow(p * slope, v_dot_grad_ptr), mask=inside)
