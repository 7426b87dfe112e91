"""The same mask inside a Triton kernel."""

import triton
import triton.language as tl


@triton.jit
def bernoulli(seed_ptr, row, start, THRESHOLD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the mask (ROWS, BLOCK), bool, of the rows ``row`` (ROWS,) and the classes from ``start``, a multiple of 4.

    One call of Philox gives four neighbours, so that drawing takes less time than moving the logits.
    """
    quad = start // 4 + tl.arange(0, BLOCK // 4)
    c0 = tl.broadcast_to(quad.to(tl.uint32)[None, :], (ROWS, BLOCK // 4))
    c1 = tl.broadcast_to(row.to(tl.uint32)[:, None], (ROWS, BLOCK // 4))
    zero = tl.zeros((ROWS, BLOCK // 4), tl.uint32)
    r0, r1, r2, r3 = tl.philox(tl.load(seed_ptr), c0, c1, zero, zero)
    # (…, BLOCK / 4, 2, 2) with r0 r1 r2 r3 in this order along the last two
    bits = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (ROWS, BLOCK))
    if THRESHOLD >= 4294967296:  # all of them; no 32 bits hold the threshold
        return bits == bits
    return bits < THRESHOLD
