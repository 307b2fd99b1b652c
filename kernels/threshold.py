"""Boundary of the k largest entries of a tensor in memory (METHOD section 3). A cell is one block."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gradpruner.kernels.device import on_device_of
from gradpruner.kernels.selection import add_counts, count_buckets, positive_bits, select, store_boundary

LAUNCH = {"BLOCK": 4096, "num_warps": 8, "enable_fp_fusion": False}
PROGRAMS = 1024  # each walks many blocks and adds its counts to the shared histogram once


@triton.jit
def count_kernel(
    f,
    state,
    histogram,
    entries,
    SHIFT: tl.constexpr,
    BINS: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the entries by the bits of one pass."""
    counts = tl.zeros((BINS,), tl.int32)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, entries, stride):
        at = start + tl.arange(0, BLOCK)
        bits = positive_bits(tl.load(f + at, mask=at < entries, other=0.0))
        counts += count_buckets(bits, state, SHIFT, BINS, FIRST)
    add_counts(counts, histogram, BINS)


@triton.jit
def count_ties_kernel(f, state, ties, entries, BLOCK: tl.constexpr):
    """Count the entries of one block that equal the value."""
    block = tl.program_id(0)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bits = positive_bits(tl.load(f + at, mask=at < entries, other=0.0))
    tl.store(ties + block, tl.sum((bits == tl.load(state).to(tl.int32)).to(tl.int32), axis=0))


@triton.jit
def locate_kernel(f, state, value, index, entries, BLOCK: tl.constexpr):
    """Find the last kept tie in its block. One program."""
    first = tl.load(state + 2) * BLOCK
    at = first + tl.arange(0, BLOCK)
    bits = positive_bits(tl.load(f + at, mask=at < entries, other=0.0))
    store_boundary(bits == tl.load(state).to(tl.int32), first, state, value, index)


def threshold(igia: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k-th largest positive entry and the flat index of the last tie that is kept (METHOD section 3)."""
    entries = igia.numel()
    blocks = triton.cdiv(entries, LAUNCH["BLOCK"])

    def count(state: Tensor, histogram: Tensor, which: dict) -> None:
        count_kernel[(min(blocks, PROGRAMS),)](igia, state, histogram, entries, **which, **LAUNCH)

    def count_ties(state: Tensor, ties: Tensor) -> None:
        count_ties_kernel[(blocks,)](igia, state, ties, entries, **LAUNCH)

    def locate(state: Tensor, value: Tensor, index: Tensor) -> None:
        locate_kernel[(1,)](igia, state, value, index, entries, **LAUNCH)

    with on_device_of(igia):
        return select(k, blocks, igia.device, count, count_ties, locate)
