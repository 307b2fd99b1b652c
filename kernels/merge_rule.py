"""The rule by which one donor's entries enter a weight (METHOD section 3), shared by both merge kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_agreeing(merged, changed, original, donor, f, at, value, index, scale):
    """Add scale * donor where it is kept and agrees in sign with the original; the same for `changed`.

    at: flat index of every entry. Entries that do not take part are selected around, not given a zero: -0.0
    and NaN keep their bits.
    """
    kept = (f > 0) & ((f > value) | ((f == value) & (at <= index)))
    agrees = ((donor > 0) & (original > 0)) | ((donor < 0) & (original < 0))
    hit = kept & agrees
    return tl.where(hit, merged + scale * donor, merged), changed | hit
