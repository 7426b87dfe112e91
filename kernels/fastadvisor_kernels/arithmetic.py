"""Arithmetic for use in Triton kernels.

``exp`` and ``inverse`` take one instruction each on NVIDIA's GPUs (FAST). Triton's own guard against denormal numbers
costs three more instructions an exponential and four a division: enough for the loss to be bound by arithmetic rather than by
memory. With FAST a result under 1.2e-38 is 0.
"""

import torch
import triton
import triton.language as tl

ACC = {torch.float32: tl.float32, torch.float64: tl.float64}
"""What a kernel sums in, by torch's name."""


@triton.jit
def exp(x, FAST: tl.constexpr):
    """Return e^x; relative error about 2^-22."""
    if FAST:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp(x)


@triton.jit
def inverse(x, FAST: tl.constexpr):
    """Return 1 / x for x in [1, 2]; an error of one unit in the last place."""
    if FAST:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return 1.0 / x


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """Return σ(x), 1 − σ(x), neither by cancellation, and σ(|x|) = 1 / (1 + e^{−|x|})."""
    e = exp(-tl.abs(x), FAST)
    large = inverse(1.0 + e, FAST)
    small = e * large
    return tl.where(x >= 0, large, small), tl.where(x >= 0, small, large), large


@triton.jit
def narrow(x, ptr):
    """Return ``x`` as it is to be stored at ``ptr``: float64 goes to half precision by way of float32.

    Triton's interpreter makes NaN of float64 stored as bfloat16, and not every GPU has the instruction.
    """
    return x.to(tl.float32) if x.dtype == tl.float64 and ptr.dtype.element_ty.primitive_bitwidth == 16 else x
