"""Pruning in large groups and whole rows: the exact boundary between kept and not, then one pass.

Source: docs/method.md, section 7.

Bit patterns of floats that are not negative order as the floats do, so the boundary is found by bisection on them. As
soon as exactly `kept` entries lie from some pattern on, that is the boundary: half the steps to the last bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gradpruner.kernels.weight_importance import importance_of
from gradpruner.kernels.weight_mask import packed

LARGEST_HELD = 1 << 14  # entries of a group that one program's registers have room for
MOST_WARPS = 16 if torch.version.hip else 32
LONG = {"BLOCK": 2048, "PART": 2048, "HELD": False, "num_warps": 8, "enable_fp_fusion": False}
AFTER_INFINITY = tl.constexpr(0x7F800001)


def launch_of(group: int) -> dict[str, Any]:
    """How the kernel is launched for this size of a group."""
    if group > LARGEST_HELD:
        return LONG
    block = triton.next_power_of_2(group)
    warps = min(max(block // 512, 1), MOST_WARPS)
    return {"BLOCK": block, "PART": block // 2, "HELD": True, "num_warps": warps, "enable_fp_fusion": False}


@triton.jit
def _bits(weight, norms, grads, alpha, start, column, first, group, BLOCK: tl.constexpr):
    """The bits of the importance of entries from `first` on, of the group that starts at `start`: int32 (BLOCK,).

    Past the end of the group they are 0, which is never counted: no count asks for less than 1, no tie lies there.
    """
    place = first + tl.arange(0, BLOCK)
    inside = place < group
    raw = tl.load(weight + start + place, mask=inside, other=0.0)
    return importance_of(raw, norms, grads, alpha, column + place, start + place, inside).to(tl.int32, bitcast=True)


@triton.jit
def _count_block(bits, low, first, before, BLOCK: tl.constexpr):
    """How many bits lie from `low` on; or, given `before`, equal it and have a place before that."""
    if before is None:
        counted = bits >= low
    else:
        counted = (bits == low) & (first + tl.arange(0, BLOCK) < before)
    return tl.sum(counted.to(tl.int32), axis=0)


@triton.jit
def _count(
    bits, weight, norms, grads, alpha, start, column, group, low, before, BLOCK: tl.constexpr, HELD: tl.constexpr
):
    """`_count_block` over the whole group, whose importance is computed anew where it is not held in `bits`."""
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
    """One group of one row.

    mask: one bit an entry if PACKED, which groups that begin with a byte can be; else uint8 (out, in).
    """
    groups = n_in // group
    row = (tl.program_id(0) // groups).to(tl.int64)
    column = tl.program_id(0) % groups * group
    start = row * n_in + column
    byte = row * tl.cdiv(n_in, 8) + column // 8
    bits = _bits(weight, norms, grads, alpha, start, column, 0, group, BLOCK)

    # From `low` on lie at least `kept` entries, from `high` on fewer.
    low, high = tl.zeros((), tl.int32), tl.full((), AFTER_INFINITY, tl.int32)
    from_low, from_high = tl.zeros((), tl.int32) + group, tl.zeros((), tl.int32)
    while (high - low > 1) & (from_low != kept):
        middle = low + (high - low) // 2
        count = _count(bits, weight, norms, grads, alpha, start, column, group, middle, None, BLOCK, HELD)
        enough = count >= kept
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
        from_low, from_high = tl.where(enough, count, from_low), tl.where(enough, from_high, count)

    # Of those at `low` the ones before a place are kept; where there are too many, that is found likewise.
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
