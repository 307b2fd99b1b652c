"""Counting entries by their bits, and finding the bucket, the cell and the entry of the k-th largest in the counts."""

from __future__ import annotations

import triton
import triton.language as tl

from gradpruner.kernels.selection_state import BASE, CELL, DONE, LAST, NARROWER, NTH, SHIFT, WANTED


@triton.jit
def positive_bits(f):
    """The bits of positive entries, 0 for those that are never kept: zero, negative and NaN."""
    return tl.where(f > 0, f.to(tl.int32, bitcast=True), 0)


@triton.jit
def unless_done(count, state):
    """count, or 0 once the boundary is known: what a loop still has to walk."""
    return tl.where(tl.load(state + DONE) != 0, 0, count)


@triton.jit
def window_counts(bits, counted, state, BINS: tl.constexpr):
    """How many of the flat `bits` that are `counted` lie in each bucket of the window, int32 (BINS,)."""
    base = tl.load(state + BASE).to(tl.int32)
    inside = counted & (bits >= base) & (bits <= tl.load(state + LAST).to(tl.int32))
    bucket = tl.where(inside, (bits - base) >> tl.load(state + SHIFT).to(tl.int32), 0)
    return tl.histogram(bucket, BINS, mask=inside)


@triton.jit
def add_counts(counts, histogram, BINS: tl.constexpr):
    """Add a program's counts to the histogram of all, int64 (BINS,)."""
    bins = tl.arange(0, BINS)
    tl.atomic_add(histogram + bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit
def pick_bucket_kernel(histogram, state, BINS: tl.constexpr):
    """Narrow the window to the bucket that holds the last wanted, and clear the histogram. One program."""
    if tl.load(state + DONE) == 0:
        bucket = BINS - 1 - tl.arange(0, BINS)
        count = tl.load(histogram + bucket)
        wanted = tl.minimum(tl.load(state + WANTED), tl.sum(count, axis=0))
        above = tl.cumsum(count, axis=0) < wanted
        shift = tl.load(state + SHIFT)
        base = tl.load(state + BASE) + ((BINS - 1 - tl.sum(above.to(tl.int64), axis=0)) << shift)
        tl.store(state + BASE, base)
        tl.store(state + LAST, base + (tl.full((), 1, tl.int64) << shift) - 1)
        tl.store(state + SHIFT, tl.maximum(shift - NARROWER, 0))
        tl.store(state + WANTED, wanted - tl.sum(tl.where(above, count, 0), axis=0))
        tl.store(histogram + bucket, tl.zeros((BINS,), tl.int64))


@triton.jit
def find_cell_kernel(ties, state, cells, BLOCK: tl.constexpr):
    """Find the cell that holds the last kept tie, from the number of ties in each cell. One program."""
    wanted = tl.load(state + WANTED)
    seen = tl.zeros((), tl.int64)
    before = tl.zeros((), tl.int64)
    cell = tl.zeros((), tl.int64)
    for start in range(0, unless_done(cells, state), BLOCK):
        at = start + tl.arange(0, BLOCK)
        count = tl.load(ties + at, mask=at < cells, other=0).to(tl.int64)
        passed = (seen + tl.cumsum(count, axis=0) < wanted) & (at < cells)
        cell += tl.sum(passed.to(tl.int64), axis=0)
        before += tl.sum(tl.where(passed, count, 0), axis=0)
        seen += tl.sum(count, axis=0)
    tl.store(state + CELL, cell)
    tl.store(state + NTH, wanted - before)


@triton.jit
def store_boundary(tie, first, state, value, index):
    """Store the value and the flat index of the last kept tie.

    tie: which of the cell's entries equal the value. first: flat index of the cell's first entry.
    """
    nth = tl.load(state + NTH)
    place = tl.sum((tl.cumsum(tie.to(tl.int32), axis=0) < nth).to(tl.int32), axis=0)
    bits = tl.load(state + BASE).to(tl.int32)
    tl.store(value, tl.where(nth > 0, bits.to(tl.float32, bitcast=True), float("inf")))
    tl.store(index, tl.where(nth > 0, first + place, -1))
