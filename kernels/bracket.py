"""A bracket around the k-th largest from a sample, and the exact choice among the entries that lie in it."""

from __future__ import annotations

import triton
import triton.language as tl

from gradpruner.kernels.selection_state import (
    ABOVE,
    BASE,
    DONE,
    FOUND,
    HIGH,
    LARGEST,
    LAST,
    LOW,
    NARROWER,
    SHIFT,
    WANTED,
    WIDEST,
)

FILL = tl.constexpr(0.9)  # of the buffer that the bracket is to fill; the rest is for the sample's error
NO_END = tl.constexpr(1 << 62)  # a rank past every sample


@triton.jit(do_not_specialize=["k", "entries", "capacity"])
def widen_bracket_kernel(histogram, state, k, entries, capacity, BINS: tl.constexpr):
    """From coarse counts of the sample: the ranks of the bracket's ends, and the window that holds both. One program.

    The bracket reaches as far on both sides of the k-th largest as the buffer allows. An end that the sample does
    not reach is open, and the window is then that of the other end.
    """
    bucket = BINS - 1 - tl.arange(0, BINS)
    count = tl.load(histogram + bucket)
    seen = tl.cumsum(count, axis=0)
    sampled = tl.sum(count, axis=0)
    share = sampled.to(tl.float64) / entries
    margin = share * capacity * (FILL / 2)
    top = tl.floor(share * k - margin).to(tl.int64)
    bottom = tl.ceil(share * k + margin).to(tl.int64)
    first = BINS - 1 - tl.sum((seen < tl.maximum(top, 1)).to(tl.int64), axis=0)
    final = BINS - 1 - tl.sum((seen < tl.minimum(bottom, sampled)).to(tl.int64), axis=0)
    lowest = tl.where(bottom > sampled, first, final)
    highest = tl.maximum(tl.where(top < 1, final, first), lowest)
    skipped = tl.sum(tl.where(bucket > highest, count, 0), axis=0)
    tl.store(state + HIGH, tl.where(top < 1, 0, top - skipped))
    tl.store(state + LOW, tl.where(bottom > sampled, NO_END, bottom - skipped))
    tl.store(state + BASE, lowest << WIDEST)
    tl.store(state + LAST, ((highest + 1) << WIDEST) - 1)
    wider = tl.sum(((1 << tl.arange(0, 16)) < highest - lowest + 1).to(tl.int64), axis=0)
    tl.store(state + SHIFT, wider + (WIDEST - NARROWER))
    tl.store(histogram + bucket, tl.zeros((BINS,), tl.int64))


@triton.jit
def close_bracket_kernel(histogram, state, BINS: tl.constexpr):
    """From fine counts of the sample: the bits of the bracket's ends. One program."""
    bucket = BINS - 1 - tl.arange(0, BINS)
    count = tl.load(histogram + bucket)
    seen = tl.cumsum(count, axis=0)
    base, shift = tl.load(state + BASE), tl.load(state + SHIFT)
    top, bottom = tl.load(state + HIGH), tl.load(state + LOW)
    past_top = BINS - tl.sum((seen < top).to(tl.int64), axis=0)
    high = tl.minimum(base + (past_top << shift) - 1, LARGEST)
    low = base + ((BINS - 1 - tl.sum((seen < bottom).to(tl.int64), axis=0)) << shift)
    tl.store(state + HIGH, tl.where(top < 1, LARGEST, high))
    tl.store(state + LOW, tl.where(bottom > tl.sum(count, axis=0), 1, tl.maximum(low, 1)))
    tl.store(histogram + bucket, tl.zeros((BINS,), tl.int64))


@triton.jit
def collect(bits, first, stride, state, found_bits, found_index, capacity, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Count a block's entries above the bracket and append those inside it.

    bits: int32 (ROWS, COLS); an entry's flat index is first + its row * stride + its column. Few are inside, so every
    row hands over its largest, one a turn: positions for all of them at once would fill the registers.
    """
    low, high = tl.load(state + LOW).to(tl.int32), tl.load(state + HIGH).to(tl.int32)
    above = tl.sum(tl.sum((bits > high).to(tl.int32), axis=1), axis=0)
    tl.atomic_add(state + ABOVE, above.to(tl.int64), sem="relaxed")
    inside = (bits >= low) & (bits <= high)
    in_row = tl.sum(inside.to(tl.int32), axis=1)
    place = tl.atomic_add(state + FOUND, tl.sum(in_row, axis=0).to(tl.int64), sem="relaxed")
    at = tl.minimum(place, capacity).to(tl.int32) + tl.cumsum(in_row, axis=0) - in_row
    row_first = first + tl.arange(0, ROWS) * stride
    left = tl.where(inside, bits, -1)
    for turn in range(tl.max(in_row, axis=0)):
        most, col = tl.max(left, axis=1, return_indices=True)
        taken = (most >= 0) & (at + turn < capacity)
        tl.store(found_bits + at + turn, most, mask=taken)
        tl.store(found_index + at + turn, row_first + col, mask=taken)
        left = tl.where(tl.arange(0, COLS)[None, :] == col[:, None], -1, left)


@triton.jit(do_not_specialize=["k", "capacity", "index_passes"])
def choose_kernel(
    found_bits,
    found_index,
    state,
    value,
    index,
    k,
    capacity,
    index_passes,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the boundary and raise DONE, or open the window for the passes over all entries. One program.

    capacity: a multiple of 16. index_passes: how many times 11 bits hold a flat index.
    """
    found = tl.load(state + FOUND)
    wanted = k - tl.load(state + ABOVE)
    if tl.load(state + LOW) == 1:  # nothing positive lies below: with fewer than k of them, all are kept
        wanted = tl.minimum(wanted, found)
    held = (found <= capacity) & (wanted >= 1) & (wanted <= found)
    tl.store(state + DONE, held.to(tl.int64))
    tl.store(state + BASE, 0)
    tl.store(state + LAST, LARGEST)
    tl.store(state + SHIFT, WIDEST)
    tl.store(state + WANTED, k)
    if held:
        room = capacity // 16 * 16  # the same number, known to be a multiple, so that loads are 16 bytes wide
        # The value, from its highest bits on: in each pass the bucket, counted from the top, of the last wanted.
        base = tl.zeros((), tl.int32)
        last = tl.full((), LARGEST, tl.int32)
        shift = tl.full((), WIDEST, tl.int32)
        for _ in range(3):
            counts = tl.zeros((BINS,), tl.int32)
            for start in range(0, found, BLOCK):
                at = start + tl.arange(0, BLOCK)
                bits = tl.load(found_bits + at, mask=at < room, other=0)
                inside = (bits >= base) & (bits <= last) & (at < found)
                bucket = tl.where(inside, BINS - 1 - ((bits - base) >> shift), 0)
                counts += tl.histogram(bucket, BINS, mask=inside)
            passed = tl.cumsum(counts, axis=0) < wanted
            wanted -= tl.sum(tl.where(passed, counts, 0), axis=0)
            base += (BINS - 1 - tl.sum(passed.to(tl.int32), axis=0)) << shift
            last = base + (1 << shift) - 1
            shift = tl.maximum(shift - NARROWER, 0)
        # Among its ties the last wanted by flat index, lowest first, in the same way.
        lowest = tl.zeros((), tl.int64)
        index_shift = (index_passes.to(tl.int64) - 1) * NARROWER
        for _ in range(index_passes):
            counts = tl.zeros((BINS,), tl.int32)
            for start in range(0, found, BLOCK):
                at = start + tl.arange(0, BLOCK)
                tie = (tl.load(found_bits + at, mask=at < room, other=0) == base) & (at < found)
                far = (tl.load(found_index + at, mask=at < room, other=0) - lowest) >> index_shift
                tie = tie & (far >= 0) & (far < BINS)
                counts += tl.histogram(tl.where(tie, far, 0).to(tl.int32), BINS, mask=tie)
            passed = tl.cumsum(counts, axis=0) < wanted
            wanted -= tl.sum(tl.where(passed, counts, 0), axis=0)
            lowest += tl.sum(passed.to(tl.int64), axis=0) << index_shift
            index_shift -= NARROWER
        tl.store(value, base.to(tl.float32, bitcast=True))
        tl.store(index, lowest)
