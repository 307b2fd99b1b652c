"""Step 3 of a selection (see `selection`): the exact choice among the candidates.

It compares their keys, in up to three rounds. Mostly the second round has the answer.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gradpruner.kernels.histogram import add_keys, take_bucket, window_bits
from gradpruner.kernels.last_program import is_last
from gradpruner.kernels.selection_state import (
    ABOVE,
    DONE,
    FLOOR,
    FOUND,
    GATHERED,
    HIGH,
    LOW,
    TAKEN,
    VALUE_BITS,
    WANTED,
    WITHIN,
)

ROUNDS = tl.constexpr(3)  # the first two decide 22 bits of a key: of the value, then, if many tie, of the index
LONGEST = tl.constexpr(62)  # bits of a key
FEW = tl.constexpr(2048)  # so many keys are searched by one program
ROWS, COLS = tl.constexpr(8), tl.constexpr(128)  # a block of candidates


@triton.jit
def candidates_hold(state, k, capacity, index_bits):
    """Whether the k-th largest is a candidate and all candidates have keys; how many are kept."""
    found = tl.load(state + FOUND)
    wanted = k - tl.load(state + ABOVE)
    if tl.load(state + LOW) == 1:  # nothing positive lies below the bracket: with fewer than k entries, all are kept
        wanted = tl.minimum(wanted, found)
    whole = (found <= capacity) & (tl.load(state + VALUE_BITS) + index_bits <= LONGEST)
    return whole & (wanted >= 1) & (wanted <= found), wanted


@triton.jit
def narrow(
    keys,
    few_keys,
    state,
    histogram,
    value,
    index,
    wanted,
    index_bits,
):
    """Do one round: narrow the window of keys, or store the boundary and set DONE.

    While many keys are in the window, all programs count them in buckets, and the last one takes a bucket as the new
    window. Once FEW are left, all programs copy them to one place and the last one searches them. If there are more
    in the last round, one program searches all candidates. That takes long and is as exact.
    """
    found, high = tl.load(state + FOUND), tl.load(state + HIGH)
    taken, floor = tl.load(state + TAKEN), tl.load(state + FLOOR)
    first_round = taken == 0
    wanted = tl.where(first_round, wanted, tl.load(state + WANTED))
    within = tl.where(first_round, found, tl.load(state + WITHIN))
    left, shift = window_bits(taken, tl.load(state + VALUE_BITS) + index_bits)
    if within <= FEW:
        step = tl.num_programs(0) * ROWS * COLS
        for start in range(tl.program_id(0) * ROWS * COLS, found, step):
            gather(keys, few_keys, state, start, found, floor, left)
        if is_last(state):
            search(few_keys, within, floor, left, wanted, high, index_bits, state, value, index)
    elif taken < ROUNDS - 1:
        step = tl.num_programs(0) * ROWS * COLS
        for start in range(tl.program_id(0) * ROWS * COLS, found, step):
            at = start + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
            key = tl.load(keys + at, mask=at < found, other=0)
            add_keys(key - floor, at < found, left, shift, histogram)
        if is_last(state):
            take_bucket(histogram, state, taken, floor, wanted, shift)
    elif tl.program_id(0) == 0:
        search(keys, found, floor, left, wanted, high, index_bits, state, value, index)


@triton.jit
def gather(keys, few_keys, state, start, found, floor, left):
    """Copy a block's keys of the window to those that are searched, in any order."""
    at = start + tl.arange(0, ROWS * COLS)
    key = tl.load(keys + at, mask=at < found, other=0)
    far = key - floor
    inside = (at < found) & (far >= 0) & (far < (tl.full((), 1, tl.int64) << left))
    upto = tl.cumsum(inside.to(tl.int32), axis=0)
    place = tl.atomic_add(state + GATHERED, tl.sum(inside.to(tl.int64), axis=0), sem="relaxed")
    tl.store(few_keys + place + upto - 1, key, mask=inside)


@triton.jit
def search(keys, count, floor, left, wanted, high, index_bits, state, value, index):
    """Find the wanted-th smallest key of the window, and store the boundary.

    One program does this. It decides one bit of the key after the other, from the highest on. A bit takes one
    comparison per key and one sum. A sort of as many keys compares them more often.
    """
    one = tl.full((), 1, tl.int64)
    base = tl.zeros((), tl.int64)
    for bit in range(0, left):
        middle = base + (one << (left - 1 - bit))
        below = tl.zeros((), tl.int64)
        for start in range(0, count, FEW):
            at = start + tl.arange(0, FEW)
            far = tl.load(keys + at, mask=at < count, other=0) - floor
            below += tl.sum(((at < count) & (far >= 0) & (far < middle)).to(tl.int32), axis=0)
        base = tl.where(below < wanted, middle, base)
    key = floor + base
    tl.store(value, (high - (key >> index_bits)).to(tl.int32).to(tl.float32, bitcast=True))
    tl.store(index, key & ((one << index_bits) - 1))
    tl.store(state + DONE, 1)
