"""Find the last tie that is kept, from the number of ties in every cell.

A selection needs this only if its bracket failed.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(2048)  # cells that are read together


@triton.jit
def find_cell(ties, wanted, cells):
    """Return the cell of the last kept tie, and the number of that tie in it.

    Ties are numbered from 1. The number is 0 if nothing is kept.
    """
    running = tl.zeros((), tl.int64)
    before = tl.zeros((), tl.int64)
    cell = tl.zeros((), tl.int64)
    for start in range(0, cells, BLOCK):
        at = start + tl.arange(0, BLOCK)
        count = tl.load(ties + at, mask=at < cells, other=0).to(tl.int64)
        passed = (running + tl.cumsum(count, axis=0) < wanted) & (at < cells)
        cell += tl.sum(passed.to(tl.int64), axis=0)
        before += tl.sum(tl.where(passed, count, 0), axis=0)
        running += tl.sum(count, axis=0)
    return cell, wanted - before


@triton.jit
def store_boundary(tie, first, nth, bits, value, index):
    """Store the value and the flat index of the last kept tie.

    tie: which entries of the cell equal the value.
    first: flat index of the cell's first entry.
    nth: the number of the last kept tie in the cell, from 1.
    bits: the bits of the value.
    """
    place = tl.sum((tl.cumsum(tie.to(tl.int32), axis=0) < nth).to(tl.int32), axis=0)
    tl.store(value, tl.where(nth > 0, bits.to(tl.float32, bitcast=True), float("inf")))
    tl.store(index, tl.where(nth > 0, first + place, -1))
