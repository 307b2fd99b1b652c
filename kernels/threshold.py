"""Boundary of the k largest entries of a tensor in memory (METHOD section 3). A cell is one block."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gradpruner.kernels.bracket import collect
from gradpruner.kernels.device import on_device_of
from gradpruner.kernels.histogram import add_counts, positive_bits, store_boundary, unless_done, window_counts
from gradpruner.kernels.selection import PROGRAMS, Passes, select
from gradpruner.kernels.selection_state import BASE, BINS, CELL, DONE

LAUNCH = {"BLOCK": 4096, "num_warps": 8, "enable_fp_fusion": False}
# The same block, seen as rows.
COLLECT = {"ROWS": 64, "COLS": 64, "num_warps": 8, "enable_fp_fusion": False}
# Of each of BLOCKS blocks of BLOCK entries, a program samples a stretch of SAMPLE_COLS.
SAMPLE = {"BLOCKS": 32, "SAMPLE_COLS": 128, "BLOCK": 4096, "num_warps": 8, "enable_fp_fusion": False}
SCATTER = tl.constexpr(7919)  # a prime: stretches of successive blocks fall on every place in a block


@triton.jit
def sample_kernel(
    f,
    state,
    histogram,
    entries,
    BINS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SAMPLE_COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count a stretch of each block, zeros too: every row of the matrix and every column has its part."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    stretch = block * SCATTER % (BLOCK // SAMPLE_COLS)
    at = block.to(tl.int64) * BLOCK + stretch * SAMPLE_COLS
    at = at[:, None] + tl.arange(0, SAMPLE_COLS)[None, :]
    bits = positive_bits(tl.load(f + at, mask=at < entries, other=0.0))
    flat = tl.reshape(bits, (BLOCKS * SAMPLE_COLS,))
    counted = tl.reshape(at < entries, (BLOCKS * SAMPLE_COLS,))
    add_counts(window_counts(flat, counted, state, BINS), histogram, BINS)


@triton.jit(do_not_specialize=["capacity"])
def collect_kernel(f, state, found_bits, found_index, capacity, entries, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Count the entries of one block above the bracket and append those inside it."""
    first = tl.program_id(0).to(tl.int64) * (ROWS * COLS)
    at = first + (tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :])
    bits = positive_bits(tl.load(f + at, mask=at < entries, other=0.0))
    collect(bits, first, COLS, state, found_bits, found_index, capacity, ROWS, COLS)


@triton.jit
def count_kernel(f, state, histogram, entries, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """Count the positive entries of the window."""
    counts = tl.zeros((BINS,), tl.int32)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, unless_done(entries, state), stride):
        at = start + tl.arange(0, BLOCK)
        bits = positive_bits(tl.load(f + at, mask=at < entries, other=0.0))
        counts += window_counts(bits, bits > 0, state, BINS)
    add_counts(counts, histogram, BINS)


@triton.jit
def count_ties_kernel(f, state, ties, entries, BLOCK: tl.constexpr):
    """Count the entries of each block that equal the value."""
    blocks = unless_done(tl.cdiv(entries, BLOCK), state)
    block = tl.program_id(0)
    while block < blocks:
        at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        bits = positive_bits(tl.load(f + at, mask=at < entries, other=0.0))
        tl.store(ties + block, tl.sum((bits == tl.load(state + BASE).to(tl.int32)).to(tl.int32), axis=0))
        block += tl.num_programs(0)


@triton.jit
def locate_kernel(f, state, value, index, entries, BLOCK: tl.constexpr):
    """Find the last kept tie in its block. One program."""
    if tl.load(state + DONE) == 0:
        first = tl.load(state + CELL) * BLOCK
        at = first + tl.arange(0, BLOCK)
        bits = positive_bits(tl.load(f + at, mask=at < entries, other=0.0))
        store_boundary(bits == tl.load(state + BASE).to(tl.int32), first, state, value, index)


def threshold(igia: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k-th largest positive entry and the flat index of the last tie that is kept (METHOD section 3)."""
    entries = igia.numel()
    blocks = triton.cdiv(entries, LAUNCH["BLOCK"])
    walking = (min(blocks, PROGRAMS),)
    sampled = (triton.cdiv(blocks, SAMPLE["BLOCKS"]),)

    def collect_all(state: Tensor, bits: Tensor, index: Tensor, capacity: int) -> None:
        collect_kernel[(blocks,)](igia, state, bits, index, capacity, entries, **COLLECT)

    passes = Passes(
        sample=lambda state, histogram: sample_kernel[sampled](igia, state, histogram, entries, BINS, **SAMPLE),
        collect=collect_all,
        count=lambda state, histogram: count_kernel[walking](igia, state, histogram, entries, BINS, **LAUNCH),
        count_ties=lambda state, ties: count_ties_kernel[walking](igia, state, ties, entries, **LAUNCH),
        locate=lambda state, value, index: locate_kernel[(1,)](igia, state, value, index, entries, **LAUNCH),
    )
    with on_device_of(igia):
        return select(k, entries, blocks, igia.device, passes)
