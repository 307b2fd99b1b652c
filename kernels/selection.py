"""Exact k-th largest of non-negative float32 entries without a sort, for both thresholds (METHOD section 3).

The order of positive float32 values is the order of their bits, 31 of them. Three passes over the entries
count them by the next 11, 10 and 10 bits; after each pass one program picks the bucket that holds the k-th.
A fourth pass counts the ties of the value in every cell, a stretch of consecutive flat indices; one program
finds the cell that holds the last kept tie, and one more the tie in that cell. Nothing visits the host.

`state`, int64 (4,): the bits found so far; how many are still to be taken among the entries that match them;
the cell of the last kept tie; which of the cell's ties it is, from 1 (0: nothing is kept at all).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

PASSES = (
    {"SHIFT": 20, "BINS": 2048, "FIRST": True},
    {"SHIFT": 10, "BINS": 1024, "FIRST": False},
    {"SHIFT": 0, "BINS": 1024, "FIRST": False},
)
PICK = {"num_warps": 4, "enable_fp_fusion": False}
FIND = {"BLOCK": 4096, "num_warps": 8, "enable_fp_fusion": False}


@triton.jit
def positive_bits(f):
    """The bits of positive entries, 0 for those that are never kept: zero, negative and NaN."""
    return tl.where(f > 0, f.to(tl.int32, bitcast=True), 0)


@triton.jit
def count_buckets(bits, state, SHIFT: tl.constexpr, BINS: tl.constexpr, FIRST: tl.constexpr):
    """How many of the flat `bits` match what was found so far, by their next bits: int32 (BINS,)."""
    candidate = bits > 0
    bucket = bits >> SHIFT
    if not FIRST:
        candidate = candidate & (bucket // BINS == tl.load(state).to(tl.int32))
    return tl.histogram(bucket % BINS, BINS, mask=candidate)


@triton.jit
def add_counts(counts, histogram, BINS: tl.constexpr):
    """Add a program's counts to the histogram of all, int64 (BINS,)."""
    bins = tl.arange(0, BINS)
    tl.atomic_add(histogram + bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit(do_not_specialize=["k"])
def pick_bucket_kernel(histogram, state, k, SHIFT: tl.constexpr, BINS: tl.constexpr, FIRST: tl.constexpr):
    """Extend the found bits by the bucket that holds the k-th largest. One program."""
    bucket = BINS - 1 - tl.arange(0, BINS)
    count = tl.load(histogram + bucket)
    if FIRST:
        found = 0
        wanted = tl.minimum(k, tl.sum(count, axis=0))
    else:
        found = tl.load(state)
        wanted = tl.load(state + 1)
    above = tl.cumsum(count, axis=0) < wanted
    tl.store(state, found * BINS + (BINS - 1 - tl.sum(above.to(tl.int32), axis=0)))
    tl.store(state + 1, wanted - tl.sum(tl.where(above, count, 0), axis=0))


@triton.jit
def find_cell_kernel(ties, state, cells, BLOCK: tl.constexpr):
    """Find the cell that holds the last kept tie, from the number of ties in each cell. One program."""
    wanted = tl.load(state + 1)
    seen = tl.zeros((), tl.int64)
    before = tl.zeros((), tl.int64)
    cell = tl.zeros((), tl.int64)
    for start in range(0, cells, BLOCK):
        at = start + tl.arange(0, BLOCK)
        count = tl.load(ties + at, mask=at < cells, other=0).to(tl.int64)
        passed = (seen + tl.cumsum(count, axis=0) < wanted) & (at < cells)
        cell += tl.sum(passed.to(tl.int64), axis=0)
        before += tl.sum(tl.where(passed, count, 0), axis=0)
        seen += tl.sum(count, axis=0)
    tl.store(state + 2, cell)
    tl.store(state + 3, wanted - before)


@triton.jit
def store_boundary(tie, first, state, value, index):
    """Store the value and the flat index of the last kept tie.

    tie: which of the cell's entries equal the value. first: flat index of the cell's first entry.
    """
    nth = tl.load(state + 3)
    place = tl.sum((tl.cumsum(tie.to(tl.int32), axis=0) < nth).to(tl.int32), axis=0)
    bits = tl.load(state).to(tl.int32)
    tl.store(value, tl.where(nth > 0, bits.to(tl.float32, bitcast=True), float("inf")))
    tl.store(index, tl.where(nth > 0, first + place, -1))


def select(
    k: int,
    cells: int,
    device: torch.device,
    count: Callable[[Tensor, Tensor, dict], None],
    count_ties: Callable[[Tensor, Tensor], None],
    locate: Callable[[Tensor, Tensor, Tensor], None],
) -> tuple[Tensor, Tensor]:
    """Run the passes: value float32 () and index int64 () of the boundary of the k largest.

    count(state, histogram, which pass) adds to the histogram, count_ties(state, ties) fills int32 (cells,),
    locate(state, value, index) stores the answer through `store_boundary`.
    """
    state = torch.empty(4, dtype=torch.int64, device=device)
    histograms = torch.zeros(len(PASSES), PASSES[0]["BINS"], dtype=torch.int64, device=device)
    ties = torch.empty(cells, dtype=torch.int32, device=device)
    value = torch.empty((), dtype=torch.float32, device=device)
    index = torch.empty((), dtype=torch.int64, device=device)
    for which, histogram in zip(PASSES, histograms, strict=True):
        count(state, histogram, which)
        pick_bucket_kernel[(1,)](histogram, state, k, **which, **PICK)
    count_ties(state, ties)
    find_cell_kernel[(1,)](ties, state, cells, **FIND)
    locate(state, value, index)
    return value, index
