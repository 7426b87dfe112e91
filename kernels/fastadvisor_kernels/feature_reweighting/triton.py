"""Meta Feature Re-Weighting in Triton: elementwise, sixteen bytes at a time where the rows are aligned."""

import triton
import triton.language as tl

from fastadvisor_kernels.arithmetic import narrow, sigmoid


@triton.jit
def place(offset, ROW: tl.constexpr, D: tl.constexpr):
    """Return where the element ``offset`` of (…, D) lies in a tensor whose rows are ROW apart; ROW = 0: one after the other."""
    return offset if ROW == 0 else (offset // D).to(tl.int64) * ROW + offset % D


@triton.jit
def offsets(BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Return this program's elements; in 64 bits (WIDE) only where they are that many, as a division takes much longer then."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    return program * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def reweight_kernel(
    f_ptr, f_dot_ptr, u_ptr, h_ptr, h_dot_ptr, count,
    D: tl.constexpr, F_ROW: tl.constexpr, F_DOT_ROW: tl.constexpr, U_ROW: tl.constexpr, H_ROW: tl.constexpr,
    ACC: tl.constexpr, FAST: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offset = offsets(BLOCK, WIDE)
    inside = offset < count
    w, _, _ = sigmoid(tl.load(u_ptr + place(offset, U_ROW, D), mask=inside, other=0.0).to(ACC), FAST)
    f = tl.load(f_ptr + place(offset, F_ROW, D), mask=inside, other=0.0).to(ACC)
    tl.store(h_ptr + place(offset, H_ROW, D), narrow(w * f, h_ptr), mask=inside)
    if f_dot_ptr is not None:
        f_dot = tl.load(f_dot_ptr + place(offset, F_DOT_ROW, D), mask=inside, other=0.0).to(ACC)
        tl.store(h_dot_ptr + offset, narrow(w * f_dot, h_dot_ptr), mask=inside)


@triton.jit
def reweight_gradient_kernel(
    grad_ptr, grad_dot_ptr, f_ptr, f_dot_ptr, u_ptr, f_grad_ptr, f_dot_grad_ptr, u_grad_ptr, count,
    D: tl.constexpr, GRAD_ROW: tl.constexpr, GRAD_DOT_ROW: tl.constexpr, F_ROW: tl.constexpr, F_DOT_ROW: tl.constexpr,
    U_ROW: tl.constexpr, MASKED: tl.constexpr, ACC: tl.constexpr, FAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    offset = offsets(BLOCK, WIDE)
    inside = offset < count
    w, rest, _ = sigmoid(tl.load(u_ptr + place(offset, U_ROW, D), mask=inside, other=0.0).to(ACC), FAST)
    grad = tl.load(grad_ptr + place(offset, GRAD_ROW, D), mask=inside, other=0.0).to(ACC)
    if f_grad_ptr is not None:
        tl.store(f_grad_ptr + offset, narrow(w * grad, f_grad_ptr), mask=inside)
    if u_grad_ptr is not None:
        pull = grad * tl.load(f_ptr + place(offset, F_ROW, D), mask=inside, other=0.0).to(ACC)
    if f_dot_ptr is not None:
        grad_dot = tl.load(grad_dot_ptr + place(offset, GRAD_DOT_ROW, D), mask=inside, other=0.0).to(ACC)
        if f_dot_grad_ptr is not None:
            tl.store(f_dot_grad_ptr + offset, narrow(w * grad_dot, f_dot_grad_ptr), mask=inside)
        if u_grad_ptr is not None:
            pull += grad_dot * tl.load(f_dot_ptr + place(offset, F_DOT_ROW, D), mask=inside, other=0.0).to(ACC)
    if u_grad_ptr is not None:
        if not MASKED:  # else f has been overwritten by W f
            pull *= w
        tl.store(u_grad_ptr + offset, narrow(rest * pull, u_grad_ptr), mask=inside)
