"""Convert between the dtype of storage and the dtype of computation, in all kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widen(x):
    """Convert a stored value for computation: float64 stays, everything else becomes float32.

    bfloat16 is converted by its bits, because the interpreter's arithmetic on bfloat16 is wrong. A GPU does the same
    shift.
    """
    if x.dtype == tl.bfloat16:
        wide = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif x.dtype == tl.float64:
        wide = x
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Convert a computed value for storage, rounding to nearest even.

    float64 goes through float32 on its way to 16 bits, as in torch. bfloat16 is rounded by its bits, because the
    interpreter truncates. So interpreter, GPU and torch agree. NaN stays NaN.
    """
    if dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        stored = tl.where(x != x, 0x7FC0, rounded).to(tl.int16).to(tl.bfloat16, bitcast=True)
    elif dtype == tl.float16:
        stored = x.to(tl.float32).to(tl.float16)
    else:
        stored = x.to(dtype)
    return stored
