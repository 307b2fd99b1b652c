"""Exact k-th largest of non-negative float32 entries in one pass and without a sort, for both thresholds.

Source: docs/method.md, section 3.

The order of positive float32 values is the order of their bits, 31 of them.

1. A sample is counted twice by its bits, coarsely and then finely: two values that bracket the k-th largest.
2. One pass over all entries counts those above the bracket and appends those inside it, value and flat index in one
   integer, to a buffer of one entry in `SHARE`.
3. Three rounds narrow these down to the last one that is kept, by value and then by flat index.

Where the sample misled, and the k-th largest is not in the bracket or the bracket does not fit the buffer, the same
three launches count all entries instead, each by the next of their bits, and a fourth counts the ties in every cell,
a stretch of consecutive flat indices, and finds the last kept tie in its cell. With DONE raised that one returns at
once, as do rounds that are not needed. Nothing visits the host, and both ways give the same answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradpruner.kernels.candidates import FEW, ROUNDS
from gradpruner.kernels.selection_state import new_state

SHARE = 128  # 8 bytes a candidate: 8 / 128 bytes an entry, 3.1 % of a bfloat16 weight
LEAST_CANDIDATES = 4096
PROGRAMS = 512  # of a launch that walks, so that one that has nothing to do ends soon


@dataclass(frozen=True)
class Buffers:
    """What the launches of one selection share on the device.

    state, histogram: `new_state`'s. keys: int64, the candidates. few_keys: int64, those that are searched. ties: int32,
    one a cell. value, index: the boundary. capacity: how many candidates `keys` takes. index_bits: of a flat index.
    """

    state: Tensor
    histogram: Tensor
    keys: Tensor
    few_keys: Tensor
    ties: Tensor
    value: Tensor
    index: Tensor
    capacity: int
    index_bits: int


@dataclass(frozen=True)
class Passes:
    """What a selection does with its entries, each call one launch.

    sample counts a part of the entries, zeros too, and ends with `end_sample`. collect appends through `collect`.
    narrow is one round, among the candidates through `narrow` or among all entries. settle counts the ties of each
    cell and stores through `store_boundary`.
    """

    sample: Callable[[Buffers], None]
    collect: Callable[[Buffers], None]
    narrow: Callable[[Buffers], None]
    settle: Callable[[Buffers], None]


def select(entries: int, cells: int, device: torch.device, passes: Passes) -> tuple[Tensor, Tensor]:
    """Boundary of so many entries in so many cells: value float32 () and index int64 ()."""
    state, histogram = new_state(device)
    capacity = max(LEAST_CANDIDATES, entries // SHARE)
    # Ties are counted only where there are no candidates, so both have the same memory.
    storage = torch.empty(max(capacity, -(-cells // 2)) + FEW.value, dtype=torch.int64, device=device)
    buffers = Buffers(
        state=state,
        histogram=histogram,
        keys=storage[FEW.value :],
        few_keys=storage,
        ties=storage[FEW.value :].view(torch.int32),
        value=torch.empty((), dtype=torch.float32, device=device),
        index=torch.empty((), dtype=torch.int64, device=device),
        capacity=capacity,
        index_bits=max(1, (entries - 1).bit_length()),
    )
    passes.sample(buffers)
    passes.sample(buffers)
    passes.collect(buffers)
    for _ in range(ROUNDS.value):
        passes.narrow(buffers)
    passes.settle(buffers)
    return buffers.value, buffers.index
