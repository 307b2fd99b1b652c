"""Count entries in buckets by atomic additions, and take the bucket of the last wanted one."""

from __future__ import annotations

import triton
import triton.language as tl

from gradpruner.kernels.selection_state import (
    ALL_BITS,
    BINS,
    COPIES,
    FLOOR,
    LARGEST,
    NARROWER,
    TAKEN,
    WANTED,
    WITHIN,
)


@triton.jit
def positive_bits(f):
    """Return the bits of positive entries, and 0 for others, which are never kept."""
    return tl.where(f > 0, f.to(tl.int32, bitcast=True), 0)


@triton.jit
def number_of(chosen):
    """Return how many entries of a block, (ROWS, COLS), are chosen.

    They are added as float32, which is exact below 2 ** 24. LLVM would turn a sum of booleans into a count of bits that
    passes through the stack.
    """
    return tl.sum(tl.sum(chosen.to(tl.float32), axis=1), axis=0).to(tl.int32)


@triton.jit
def add_to_buckets(bucket, counted, histogram):
    """Count the entries of a block in this program's copy of the histogram.

    bucket: int32 (ROWS, COLS). counted: which entries count.

    Entries in the lowest bucket of the block are summed first. They are zeros, or ties if nothing else is in the
    window. Otherwise each of them would be an addition to the same address.
    """
    copy = histogram + tl.program_id(0) % COPIES * BINS
    lowest = tl.min(tl.min(tl.where(counted, bucket, BINS), axis=1), axis=0)
    alike = counted & (bucket == lowest)
    number = number_of(alike)
    tl.atomic_add(copy + lowest, number.to(tl.int64), mask=number > 0, sem="relaxed")
    one = tl.full(bucket.shape, 1, tl.int64)
    tl.atomic_add(copy + bucket, one, mask=counted & (bucket != lowest), sem="relaxed")


@triton.jit
def take_counts(histogram, bucket):
    """Return the counts of all programs for some buckets, int64, and clear the histogram."""
    count = tl.zeros(bucket.shape, tl.int64)
    for copy in range(COPIES):
        at = histogram + copy * BINS + bucket
        count += tl.load(at)
        tl.store(at, tl.zeros(bucket.shape, tl.int64))
    return count


@triton.jit
def window_bits(taken, key_bits):
    """Return how many low bits of a key are open in the window, and how many in a bucket."""
    left = tl.maximum(key_bits - taken * NARROWER, 0)
    return left, tl.maximum(left - NARROWER, 0)


@triton.jit
def add_keys(far, counted, left, shift, histogram):
    """Count the keys of the window.

    far: how far each key is from the smallest of the window, int64 (ROWS, COLS).
    """
    inside = counted & (far >= 0) & (far < (tl.full((), 1, tl.int64) << left))
    bucket = tl.where(inside, far >> shift, 0).to(tl.int32)
    add_to_buckets(bucket, inside, histogram)


@triton.jit
def take_bucket(histogram, state, taken, floor, wanted, shift):
    """Narrow the window to the bucket of the last wanted key. One program does this.

    taken, floor: TAKEN and FLOOR of the state, which were read before any program could change them.
    """
    bucket = tl.arange(0, BINS)
    count = take_counts(histogram, bucket)
    wanted = tl.minimum(wanted, tl.sum(count, axis=0))
    passed = tl.cumsum(count, axis=0) < wanted
    taker = tl.sum(passed.to(tl.int64), axis=0)
    tl.store(state + FLOOR, floor + (taker << shift))
    tl.store(state + WANTED, wanted - tl.sum(tl.where(passed, count, 0), axis=0))
    tl.store(state + WITHIN, tl.sum(tl.where(bucket == taker, count, 0), axis=0))
    tl.store(state + TAKEN, taken + 1)


@triton.jit
def value_window(state, k):
    """Return the window of keys for a selection without a bracket.

    There a key is the distance of an entry's bits from the largest possible. Returned are TAKEN, FLOOR, the number of
    wanted keys, and the two counts of `window_bits`.
    """
    taken, floor = tl.load(state + TAKEN), tl.load(state + FLOOR)
    wanted = tl.where(taken == 0, k, tl.load(state + WANTED))
    left, shift = window_bits(taken, ALL_BITS)
    return taken, floor, wanted, left, shift


@triton.jit
def add_values(bits, floor, left, shift, histogram):
    """Count the positive entries of the window. bits: int32 (ROWS, COLS)."""
    add_keys((bits ^ LARGEST).to(tl.int64) - floor, bits > 0, left, shift, histogram)
