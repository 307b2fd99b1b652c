"""The rule by which one donor's entries enter a weight (METHOD section 3), shared by both merge kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_agreeing(merged, changed, original, donor, f, first, offset, value, index, scale):
    """Add scale * donor where it is kept and agrees in sign with the original, and note it in `changed`.

    first: flat index of the block's first entry, offset: every entry's distance from it, 32 bits. What does
    not take part is selected around, not given a zero: -0.0 and NaN keep their bits.
    """
    last = tl.minimum(tl.maximum(index - first, -1), 0x7FFFFFFF).to(tl.int32)
    kept = (f > 0) & ((f > value) | ((f == value) & (offset <= last)))
    agrees = ((donor > 0) & (original > 0)) | ((donor < 0) & (original < 0))
    hit = kept & agrees
    return tl.where(hit, merged + scale * donor, merged), changed | hit
