"""Steps 1 and 2 of a selection (see `selection`): the bracket, and the candidates in it.

The bracket is two values that probably lie around the k-th largest entry. A sample gives them. The candidates are the
entries that lie in the bracket. An entry is known by the bits of its float32 value, which order as the values do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gradpruner.kernels.histogram import add_to_buckets, take_counts
from gradpruner.kernels.last_program import is_last
from gradpruner.kernels.selection_state import (
    ABOVE,
    BASE,
    BINS,
    FOUND,
    HIGH,
    LARGEST,
    LOW,
    NARROWER,
    SAMPLES,
    SHIFT,
    VALUE_BITS,
    WIDEST,
)

FILL = tl.constexpr(0.9)  # share of the buffer that the bracket should fill; the rest is for the error of the sample
NO_END = tl.constexpr(1 << 62)  # a rank that no sample reaches


@triton.jit
def sample_window(state):
    """Load SAMPLES, and the window of this pass over the sample: BASE (int32) and SHIFT."""
    samples = tl.load(state + SAMPLES)
    shift = tl.where(samples == 0, WIDEST, tl.load(state + SHIFT))
    return samples, tl.load(state + BASE).to(tl.int32), shift.to(tl.int32)


@triton.jit
def add_sample(bits, counted, base, shift, histogram):
    """Count the entries of a part of the sample that lie in the window. Zeros count too.

    bits: int32 (ROWS, COLS).
    """
    bucket = (bits - base) >> shift
    inside = counted & (bits >= base) & (bucket < BINS)
    add_to_buckets(tl.where(inside, bucket, 0), inside, histogram)


@triton.jit
def end_sample(samples, base, shift, histogram, state, k, entries, capacity):
    """End a pass over the sample: the last program brings the ends of the bracket closer."""
    if is_last(state):
        top, bottom = tl.load(state + HIGH), tl.load(state + LOW)
        bucket = BINS - 1 - tl.arange(0, BINS)
        count = take_counts(histogram, bucket)
        running = tl.cumsum(count, axis=0)
        counted = tl.sum(count, axis=0)
        if samples == 0:
            widen(bucket, count, running, counted, state, k, entries, capacity)
        else:
            close(running, counted, top, bottom, base.to(tl.int64), shift, state)
        tl.store(state + SAMPLES, samples + 1)


@triton.jit
def widen(bucket, count, running, sampled, state, k, entries, capacity):
    """Find the ranks of the bracket's ends from coarse counts, and the window that holds both.

    The bracket reaches as far to both sides of the k-th largest entry as the buffer allows. If the sample does not
    reach one end, that end is open. The window is then that of the other end.
    """
    share = sampled.to(tl.float64) / entries
    margin = share * capacity * (FILL / 2)
    top = tl.floor(share * k - margin).to(tl.int64)
    bottom = tl.ceil(share * k + margin).to(tl.int64)
    first = BINS - 1 - tl.sum((running < tl.maximum(top, 1)).to(tl.int64), axis=0)
    final = BINS - 1 - tl.sum((running < tl.minimum(bottom, sampled)).to(tl.int64), axis=0)
    lowest = tl.where(bottom > sampled, first, final)
    highest = tl.maximum(tl.where(top < 1, final, first), lowest)
    wider = bits_of(highest - lowest)
    skipped = tl.sum(tl.where(bucket >= lowest + (tl.full((), 1, tl.int64) << wider), count, 0), axis=0)
    tl.store(state + HIGH, tl.where(top < 1, 0, top - skipped))
    tl.store(state + LOW, tl.where(bottom > sampled, NO_END, bottom - skipped))
    tl.store(state + BASE, lowest << WIDEST)
    tl.store(state + SHIFT, wider + (WIDEST - NARROWER))


@triton.jit
def close(running, counted, top, bottom, base, shift, state):
    """Find the bits of the bracket's ends from fine counts."""
    past_top = BINS - tl.sum((running < top).to(tl.int64), axis=0)
    high = tl.minimum(base + (past_top << shift) - 1, LARGEST)
    high = tl.where(top < 1, LARGEST, high)
    low = base + ((BINS - 1 - tl.sum((running < bottom).to(tl.int64), axis=0)) << shift)
    low = tl.where(bottom > counted, 1, tl.maximum(low, 1))
    tl.store(state + HIGH, high)
    tl.store(state + LOW, low)
    tl.store(state + VALUE_BITS, bits_of(high - low))


@triton.jit
def bits_of(number):
    """Return how many bits hold a number below 2 ** 32. It is 0 for 0 and less."""
    return tl.sum(((tl.full((32,), 1, tl.int64) << tl.arange(0, 32)) <= number).to(tl.int64), axis=0)


@triton.jit
def collect(bits, first, far, state, keys, capacity, index_bits):
    """Count a block's entries above the bracket, and append the keys of those inside it.

    bits: int32 (ROWS, COLS). The flat index of an entry is first + far of its row + its column.

    A key is the distance of the value from the bracket's upper end, followed by the flat index. The entry that the
    rule takes first has the smallest key.

    Few entries are inside. So every row hands over its largest entry, one per turn. Rows are short, so that one thread
    holds a row and there are few turns.
    """
    low, high = tl.load(state + LOW).to(tl.int32), tl.load(state + HIGH).to(tl.int32)
    # Both counts in one number, so that one sum serves. A block has fewer than 2 ** 15 entries.
    counts = tl.sum(tl.where(bits > high, 1 << 16, (bits >= low).to(tl.int32)), axis=1)
    both = tl.sum(counts, axis=0)
    tl.atomic_add(state + ABOVE, (both >> 16).to(tl.int64), sem="relaxed")
    place = tl.atomic_add(state + FOUND, (both & 0xFFFF).to(tl.int64), sem="relaxed")
    in_row = counts & 0xFFFF
    at = tl.minimum(place, capacity).to(tl.int32) + tl.cumsum(in_row, axis=0) - in_row
    left = tl.where(bits > high, -1, bits)
    for turn in range(tl.max(in_row, axis=0)):
        # The leftmost of equal entries. Threads that share a row would otherwise find different ones, and lose some.
        most, col = tl.max(left, axis=1, return_indices=True)
        key = ((high - most).to(tl.int64) << index_bits) + (first + (far + col))
        tl.store(keys + at + turn, key, mask=(most >= low) & (at + turn < capacity))
        left = tl.where(tl.arange(0, bits.shape[1])[None, :] == col[:, None], -1, left)
