"""Find the exact k-th largest float32 entry in one pass, without a sort.

`threshold` and `factor_threshold` both use it. Entries that are not positive are never kept. Positive float32 values
order as their bits do, which are 31.

1. A sample of the entries is counted twice by its bits, coarsely and then finely. This gives the bracket: two values
   that probably lie around the k-th largest entry.
2. One pass over all entries counts those above the bracket. It appends those inside it, the candidates, to a buffer
   that has room for one entry in `SHARE`. Value and flat index of a candidate are one integer, its key.
3. Up to three rounds narrow the candidates down to the last one that is kept, by value and then by flat index.

The sample may mislead: the k-th largest entry is not in the bracket, or too many are. Then the launches of step 3 count
all entries instead, each round by the next of their bits. A fourth launch counts the ties in every cell, a stretch of
consecutive flat indices, and finds the last tie that is kept. If it is not needed, it returns at once, as do rounds
that are not needed. Nothing is copied to the host. Both ways give the same answer.

Source: docs/method.md, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradpruner.kernels.candidates import FEW, ROUNDS
from gradpruner.kernels.selection_state import new_state

SHARE = 128  # 8 bytes per candidate are 8 / 128 bytes per entry, 3.1 % of a bfloat16 weight
LEAST_CANDIDATES = 4096
PROGRAMS = 512  # of a launch whose programs walk over all entries: few, so that it ends soon if not needed


@dataclass(frozen=True)
class Buffers:
    """What the launches of one selection share on the device.

    Args:
        state: int64, numbers that the launches leave for each other (see `selection_state`).
        histogram: int64, counts by bucket.
        keys: int64, the keys of the candidates.
        few_keys: int64, the keys that are searched in the last round.
        ties: int32, the number of ties per cell.
        value: float32 (), the result.
        index: int64 (), the result.
        capacity: how many candidates fit in `keys`.
        index_bits: how many bits a flat index needs.
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
    """What a selection does with its entries. Each call is one launch.

    Args:
        sample: counts a part of the entries, zeros too, and ends with `bracket.end_sample`.
        collect: counts and appends entries with `bracket.collect`.
        narrow: does one round, among the candidates with `candidates.narrow`, or among all entries.
        settle: counts the ties of each cell, and stores the result with `ties.store_boundary`.
    """

    sample: Callable[[Buffers], None]
    collect: Callable[[Buffers], None]
    narrow: Callable[[Buffers], None]
    settle: Callable[[Buffers], None]


def select(entries: int, cells: int, device: torch.device, passes: Passes) -> tuple[Tensor, Tensor]:
    """Run all launches of a selection.

    Args:
        entries: how many entries there are.
        cells: how many cells they make.
        device: where the kernels run.
        passes: the launches.

    Returns:
        The value, float32 (), and the flat index of the last tie that is kept, int64 ().
    """
    state, histogram = new_state(device)
    capacity = max(LEAST_CANDIDATES, entries // SHARE)
    # Ties are counted only if there are no candidates, so both use the same memory.
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
