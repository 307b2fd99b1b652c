"""The rule by which one donor's entries enter a weight (docs/method.md, section 3), shared by both merge kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from gradpruner.kernels.numeric import narrow


@triton.jit
def keeps(f, value, before):
    """Which entries the boundary keeps. before: those whose flat index is not past that of the last kept tie."""
    return (f > 0) & ((f > value) | ((f == value) & before))


@triton.jit
def may_agree(original):
    """Which entries some donor can agree with in sign: not zero, not NaN."""
    return (original > 0) | (original < 0)


@triton.jit
def add_agreeing(merged, original, donor, kept, scale):
    """merged, plus scale * donor where it is kept and agrees in sign with the original. kept: only where that may be.

    Signs are compared by their bits: comparisons of the original would be kept in registers from donor to donor.
    """
    BITS: tl.constexpr = tl.int64 if original.dtype == tl.float64 else tl.int32
    same = (original.to(BITS, bitcast=True) ^ donor.to(BITS, bitcast=True)) >= 0
    return tl.where(kept & same & (tl.abs(donor) > 0), merged + scale * donor, merged)


@triton.jit
def as_stored(merged, original, raw):
    """merged in the dtype of raw; what no donor changed keeps its bits, so that -0.0 and NaN stay as they were.

    A NaN agrees with nothing, so it is never changed, though it does not equal itself.
    """
    changed = (merged != original) & (original == original)
    return tl.where(changed, narrow(merged, raw.dtype), raw)
