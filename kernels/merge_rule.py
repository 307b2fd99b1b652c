"""The rule by which a donor's entries are merged into a weight. Both merge kernels use it.

Source: docs/method.md, section 3.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gradpruner.kernels.numeric import narrow


@triton.jit
def keeps(f, value, before):
    """Which entries the boundary keeps.

    before: which entries have a flat index up to that of the last kept tie.
    """
    return (f > 0) & ((f > value) | ((f == value) & before))


@triton.jit
def may_agree(original):
    """Which entries a donor can agree with in sign: those that are not zero and not NaN."""
    return (original > 0) | (original < 0)


@triton.jit
def add_agreeing(merged, original, donor, kept, scale):
    """Add scale * donor to merged, where the donor is kept and agrees in sign.

    kept: which entries of the donor are kept, and only where `may_agree` holds.

    The sign is compared with that of the original. Signs are compared by their bits. The compiler would keep other
    comparisons of the original in registers from donor to donor.
    """
    BITS: tl.constexpr = tl.int64 if original.dtype == tl.float64 else tl.int32
    same = (original.to(BITS, bitcast=True) ^ donor.to(BITS, bitcast=True)) >= 0
    return tl.where(kept & same & (tl.abs(donor) > 0), merged + scale * donor, merged)


@triton.jit
def as_stored(merged, original, raw):
    """Return merged in the dtype of raw, with the bits of raw where no donor changed it.

    So -0.0 and NaN stay as they were. A NaN does not equal itself, but it agrees with nothing, so it was not changed.
    """
    changed = (merged != original) & (original == original)
    return tl.where(changed, narrow(merged, raw.dtype), raw)
