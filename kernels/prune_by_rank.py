"""Prune small groups of a weight (out, in), as in N:M sparsity: by the rank of each entry.

The rank of an entry is the number of entries of its group that are more important.

Source: docs/method.md, section 7.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gradpruner.kernels.weight_importance import importance_of
from gradpruner.kernels.weight_mask import packed

LARGEST = 32  # entries of a group
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}
ENTRIES = 1024  # of one program: whole bytes of a mask


def launch_of(group: int) -> dict[str, int]:
    """Return constants and options of a launch for groups of this size."""
    lanes = triton.next_power_of_2(group)
    return {"GROUP": group, "LANES": lanes, "GROUPS": ENTRIES // lanes, **LAUNCH}


@triton.jit(do_not_specialize=["kept"])
def prune_by_rank_kernel(
    weight,
    norms,
    grads,
    mask,
    alpha,
    kept,
    n_in,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Prune some groups of one row.

    LANES: the smallest power of two that is at least GROUP.
    mask: one bit per entry if LANES equals GROUP. Else groups may end inside a byte, and it is uint8 (out, in).
    """
    parts = tl.cdiv(n_in, GROUPS * GROUP)
    row = (tl.program_id(0) // parts).to(tl.int64)
    first = tl.program_id(0) % parts * (GROUPS * GROUP)
    lane = tl.arange(0, LANES)[None, :]
    # Flat where possible: then a thread loads 16 bytes at once, across small groups.
    if LANES == GROUP:
        column = first + tl.arange(0, GROUPS * GROUP)
        inside = column < n_in
    else:
        column = first + tl.arange(0, GROUPS)[:, None] * GROUP + lane
        inside = (column < n_in) & (lane < GROUP)
    at = row * n_in + column
    raw = tl.load(weight + at, mask=inside, other=0.0)
    found = importance_of(raw, norms, grads, alpha, column, at, inside)
    own = tl.reshape(found, (GROUPS, LANES))
    rank = tl.zeros((GROUPS, LANES), tl.int32)
    for place in range(GROUP):
        other = tl.max(tl.where(lane == place, own, 0.0), axis=1)[:, None]
        rank += ((other > own) | ((other == own) & (lane > place))).to(tl.int32)
    keep = rank < kept
    if LANES == GROUP:
        keep = tl.reshape(keep, (GROUPS * GROUP,)) & inside
        byte = first // 8 + tl.arange(0, GROUPS * GROUP // 8)
        bytes_per_row = tl.cdiv(n_in, 8)
        tl.store(mask + row * bytes_per_row + byte, packed(keep, GROUPS * GROUP), mask=byte < bytes_per_row)
    else:
        tl.store(mask + at, keep.to(tl.uint8), mask=inside)
    tl.store(weight + at, tl.where(keep, raw, 0.0), mask=inside)
