"""Prune large groups and whole rows of a weight (out, in) by an exact boundary.

Bit patterns of floats that are not negative order as the floats do. So the boundary is found by bisection of the
patterns. It is found as soon as exactly `kept` entries are at or above some pattern. This mostly takes half of the
steps that would decide every bit.

Source: docs/method.md, section 7.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gradpruner.kernels.weight_importance import importance_of
from gradpruner.kernels.weight_mask import packed

LARGEST_HELD = 1 << 14  # so many entries of a group fit in the registers of one program
MOST_WARPS = 16 if torch.version.hip else 32
LONG = {"BLOCK": 2048, "PART": 2048, "HELD": False, "num_warps": 8, "enable_fp_fusion": False}
AFTER_INFINITY = tl.constexpr(0x7F800001)


def launch_of(group: int) -> dict[str, Any]:
    """Return constants and options of a launch for groups of this size."""
    if group > LARGEST_HELD:
        return LONG
    block = triton.next_power_of_2(group)
    warps = min(max(block // 512, 1), MOST_WARPS)
    return {"BLOCK": block, "PART": block // 2, "HELD": True, "num_warps": warps, "enable_fp_fusion": False}


@triton.jit
def _bits(weight, norms, grads, alpha, start, column, first, group, BLOCK: tl.constexpr):
    """Return the bits of the importance of a block of a group, int32 (BLOCK,).

    start: flat index of the group's first entry.
    column: its column.
    first: the place of the block in the group.

    Past the end of the group the bits are 0. They are never counted: no count is of bits below 1, and no tie is there.
    """
    place = first + tl.arange(0, BLOCK)
    inside = place < group
    raw = tl.load(weight + start + place, mask=inside, other=0.0)
    return importance_of(raw, norms, grads, alpha, column + place, start + place, inside).to(tl.int32, bitcast=True)


@triton.jit
def _count_block(bits, low, first, before, BLOCK: tl.constexpr):
    """Count the bits that are at least `low`, or with `before` the ties with `low` before it."""
    if before is None:
        counted = bits >= low
    else:
        counted = (bits == low) & (first + tl.arange(0, BLOCK) < before)
    return tl.sum(counted.to(tl.int32), axis=0)


@triton.jit
def _count(
    bits, weight, norms, grads, alpha, start, column, group, low, before, BLOCK: tl.constexpr, HELD: tl.constexpr
):
    """Do `_count_block` over the whole group.

    Its importance is computed again, unless `bits` holds it.
    """
    if HELD:
        count = _count_block(bits, low, 0, before, BLOCK)
    else:
        count = tl.zeros((), tl.int32)
        for first in range(0, group, BLOCK):
            there = _bits(weight, norms, grads, alpha, start, column, first, group, BLOCK)
            count += _count_block(there, low, first, before, BLOCK)
    return count


@triton.jit(do_not_specialize=["kept"])
def prune_by_boundary_kernel(
    weight,
    norms,
    grads,
    mask,
    alpha,
    kept,
    group,
    n_in,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    HELD: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Prune one group of one row.

    mask: one bit per entry if PACKED, which is possible if every group begins with a byte of the mask. Else
    uint8 (out, in), one byte per entry.
    """
    groups = n_in // group
    row = (tl.program_id(0) // groups).to(tl.int64)
    column = tl.program_id(0) % groups * group
    start = row * n_in + column
    byte = row * tl.cdiv(n_in, 8) + column // 8
    bits = _bits(weight, norms, grads, alpha, start, column, 0, group, BLOCK)

    # At least `kept` entries are at or above `low`. Fewer are at or above `high`.
    low, high = tl.zeros((), tl.int32), tl.full((), AFTER_INFINITY, tl.int32)
    from_low, from_high = tl.zeros((), tl.int32) + group, tl.zeros((), tl.int32)
    while (high - low > 1) & (from_low != kept):
        middle = low + (high - low) // 2
        count = _count(bits, weight, norms, grads, alpha, start, column, group, middle, None, BLOCK, HELD)
        enough = count >= kept
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
        from_low, from_high = tl.where(enough, count, from_low), tl.where(enough, from_high, count)

    # Of the entries at `low`, those before some place are kept. If they are too many, bisection finds the place.
    before, too_far = tl.where(from_low == kept, group, 0), tl.zeros((), tl.int32) + group
    while too_far - before > 1:
        middle = before + (too_far - before) // 2
        count = _count(bits, weight, norms, grads, alpha, start, column, group, low, middle, BLOCK, HELD)
        fits = from_high + count <= kept
        before, too_far = tl.where(fits, middle, before), tl.where(fits, too_far, middle)

    for first in range(0, group, PART):
        found = _bits(weight, norms, grads, alpha, start, column, first, group, PART)
        place = first + tl.arange(0, PART)
        keep = (found > low) | ((found == low) & (place < before))
        raw = tl.load(weight + start + place, mask=place < group, other=0.0)
        tl.store(weight + start + place, tl.where(keep, raw, 0.0), mask=place < group)
        if PACKED:
            at = first // 8 + tl.arange(0, PART // 8)
            tl.store(mask + byte + at, packed(keep, PART), mask=at * 8 < group)
        else:
            tl.store(mask + start + place, keep.to(tl.uint8), mask=place < group)
