"""Find the boundary of the k largest entries of an importance in memory.

It may have any shape. The passes are those of `selection`. A cell is one block of consecutive entries.

Source: docs/method.md, section 3, step 1.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gradpruner.kernels.bracket import add_sample, collect, end_sample, sample_window
from gradpruner.kernels.candidates import candidates_hold, narrow
from gradpruner.kernels.device import common_alignment, on_device_of
from gradpruner.kernels.histogram import add_values, number_of, positive_bits, take_bucket, value_window
from gradpruner.kernels.last_program import is_last
from gradpruner.kernels.selection import PROGRAMS, Buffers, Passes, select
from gradpruner.kernels.selection_state import DONE, FLOOR, LARGEST, WANTED
from gradpruner.kernels.ties import find_cell, store_boundary

# A block of ROWS * COLS consecutive entries, arranged in rows.
LAUNCH = {"ROWS": 32, "COLS": 128, "num_warps": 8, "enable_fp_fusion": False}
COLLECT = {"ROWS": 1024, "COLS": 4, "num_warps": 8, "enable_fp_fusion": False}  # one thread loads a row at once
BLOCK = LAUNCH["ROWS"] * LAUNCH["COLS"]
SAMPLE = {"ROWS": 16, "COLS": 128, "STRIDE": BLOCK, "num_warps": 8, "enable_fp_fusion": False}
# How many entries are sampled. In a sample of independent entries, the share p above a value has a standard deviation
# of sqrt(p (1 - p) / SAMPLED), which is 0.06 % of the entries at p = 0.2. The bracket reaches FILL / 2 of the buffer,
# 0.35 % of the entries, to each side. That is 5.9 standard deviations at p = 0.2, and 4.7 at p = 0.5.
SAMPLED = 450_000
# Entries of the shortest stretch: fewer do not fill a line of memory.
SHORTEST = 32
SCATTER = tl.constexpr(7919)  # a prime, so that the stretches of successive blocks fall on every place in a block


@triton.jit(do_not_specialize=["k", "capacity", "log_stretch", "entries"])
def sample_kernel(
    f,
    state,
    histogram,
    k,
    capacity,
    log_stretch,
    entries,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Count a stretch of each STRIDE entries. Zeros count too.

    The stretches lie so that every row and every column of a matrix has its part.
    """
    samples, base, shift = sample_window(state)
    n = tl.program_id(0).to(tl.int64) * (ROWS * COLS)
    n += tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    block = n >> log_stretch
    place = (block * SCATTER % (STRIDE >> log_stretch) << log_stretch) + (n - (block << log_stretch))
    at = block * STRIDE + place
    bits = positive_bits(tl.load(f + at, mask=at < entries, other=0.0))
    add_sample(bits, at < entries, base, shift, histogram)
    end_sample(samples, base, shift, histogram, state, k, entries, capacity)


@triton.jit
def block_bits(f, first, entries, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the bits of the positive entries of the block at `first`, and 0 for others."""
    # The same number, now known to be a multiple of ALIGN, so that 16 bytes are loaded at once.
    entries = entries // ALIGN * ALIGN
    at = first + (tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :])
    return positive_bits(tl.load(f + at, mask=at < entries, other=0.0))


@triton.jit(do_not_specialize=["capacity", "index_bits", "entries"])
def collect_kernel(
    f,
    state,
    keys,
    capacity,
    index_bits,
    entries,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Count the entries of one block above the bracket, and append those inside it."""
    first = tl.program_id(0).to(tl.int64) * (ROWS * COLS)
    bits = block_bits(f, first, entries, ALIGN, ROWS, COLS)
    collect(bits, first, tl.arange(0, ROWS) * COLS, state, keys, capacity, index_bits)


@triton.jit(do_not_specialize=["k", "capacity", "index_bits", "entries"])
def narrow_kernel(
    f,
    state,
    histogram,
    keys,
    few_keys,
    value,
    index,
    k,
    capacity,
    index_bits,
    entries,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Do one round among the candidates, or among all entries if the bracket failed."""
    if tl.load(state + DONE) == 0:
        hold, wanted = candidates_hold(state, k, capacity, index_bits)
        if hold:
            narrow(keys, few_keys, state, histogram, value, index, wanted, index_bits)
        else:
            taken, floor, wanted, left, shift = value_window(state, k)
            stride = tl.num_programs(0).to(tl.int64) * (ROWS * COLS)
            for first in range(tl.program_id(0).to(tl.int64) * (ROWS * COLS), entries, stride):
                bits = block_bits(f, first, entries, ALIGN, ROWS, COLS)
                add_values(bits, floor, left, shift, histogram)
            if is_last(state):
                take_bucket(histogram, state, taken, floor, wanted, shift)


@triton.jit(do_not_specialize=["entries"])
def settle_kernel(
    f,
    state,
    ties,
    value,
    index,
    entries,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """If the bracket failed: count the ties in each block, and find the last that is kept."""
    if tl.load(state + DONE) == 0:
        bits = (tl.load(state + FLOOR) ^ LARGEST).to(tl.int32)
        wanted = tl.load(state + WANTED)
        blocks = tl.cdiv(entries, ROWS * COLS)
        block = tl.program_id(0)
        while block < blocks:
            tie = block_bits(f, block.to(tl.int64) * (ROWS * COLS), entries, ALIGN, ROWS, COLS) == bits
            tl.store(ties + block, number_of(tie))
            block += tl.num_programs(0)
        if is_last(state):
            cell, nth = find_cell(ties, wanted, blocks)
            first = cell * (ROWS * COLS)
            tie = block_bits(f, first, entries, ALIGN, ROWS, COLS) == bits
            store_boundary(tl.reshape(tie, (ROWS * COLS,)), first, nth, bits, value, index)


def log_stretch(entries: int) -> int:
    """Return log2 of how many consecutive entries of each block are sampled."""
    wanted = min(BLOCK, max(SHORTEST, -(-SAMPLED * BLOCK // max(1, entries))))
    return (wanted - 1).bit_length()


def threshold(igia: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the boundary of the k largest entries. See `gradpruner.ops.threshold`.

    Args:
        igia, k: as in the op.
    """
    entries = igia.numel()
    blocks = triton.cdiv(entries, BLOCK)
    stretch = log_stretch(entries)
    sampled = (triton.cdiv(blocks << stretch, SAMPLE["ROWS"] * SAMPLE["COLS"]),)
    walking = (min(blocks, PROGRAMS),)
    align = common_alignment([entries])

    def sample(x: Buffers) -> None:
        sample_kernel[sampled](igia, x.state, x.histogram, k, x.capacity, stretch, entries, **SAMPLE)

    def collect_all(x: Buffers) -> None:
        collect_kernel[(blocks,)](igia, x.state, x.keys, x.capacity, x.index_bits, entries, ALIGN=align, **COLLECT)

    def narrow_once(x: Buffers) -> None:
        sizes = (k, x.capacity, x.index_bits, entries)
        narrow_kernel[walking](
            igia, x.state, x.histogram, x.keys, x.few_keys, x.value, x.index, *sizes, ALIGN=align, **LAUNCH
        )

    def settle(x: Buffers) -> None:
        settle_kernel[walking](igia, x.state, x.ties, x.value, x.index, entries, ALIGN=align, **LAUNCH)

    with on_device_of(igia):
        return select(entries, blocks, igia.device, Passes(sample, collect_all, narrow_once, settle))
