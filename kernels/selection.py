"""Exact k-th largest of non-negative float32 entries in one pass and without a sort, for both thresholds (METHOD 3).

The order of positive float32 values is the order of their bits, 31 of them.

1. A sample is counted twice by its bits, coarsely and then finely: two values that bracket the k-th largest.
2. One pass over all entries counts those above the bracket and appends those inside it, their bits and flat index,
   to a buffer of one entry in `SHARE`.
3. One program selects among these: the value by its bits, then the last kept tie by its flat index.

Where the sample misled, and the k-th largest is not in the bracket or the bracket does not fit the buffer, step 3
leaves the flag DONE down, and the kernels that follow do without a bracket: three passes over all entries count them
by their next bits, a fourth counts the ties in every cell, a stretch of consecutive flat indices; one program finds
the cell of the last kept tie, and one more the tie in it. They are launched always, and with DONE raised they return
at once. Nothing visits the host, and both ways give the same answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradpruner.kernels.bracket import choose_kernel, close_bracket_kernel, widen_bracket_kernel
from gradpruner.kernels.histogram import find_cell_kernel, pick_bucket_kernel
from gradpruner.kernels.selection_state import BINS, NARROWER, new_state

SHARE = 128  # 12 bytes a candidate: 12 / 128 bytes an entry, 4.7 % of a bfloat16 weight
LEAST_CANDIDATES = 4096
PROGRAMS = 1024  # of a pass over all entries that walks, so that one that has nothing to do ends soon

ONE_PROGRAM = {"BINS": BINS, "num_warps": 8, "enable_fp_fusion": False}
CELL_SEARCH = {"BLOCK": 4096, "num_warps": 8, "enable_fp_fusion": False}
# AMD's wavefronts are twice as wide.
CHOICE = {"BINS": BINS, "BLOCK": 8192, "num_warps": 8 if torch.version.hip else 16, "enable_fp_fusion": False}


@dataclass(frozen=True)
class Passes:
    """What a selection does with all its entries, each call one launch.

    sample(state, histogram) counts a part of the entries, zeros too, in the window; count(state, histogram) all
    positive ones. collect(state, bits, index, capacity) appends to int32 and int64 (capacity,) through `collect`.
    count_ties(state, ties) fills int32 (cells,); locate(state, value, index) stores through `store_boundary`.
    """

    sample: Callable[[Tensor, Tensor], None]
    collect: Callable[[Tensor, Tensor, Tensor, int], None]
    count: Callable[[Tensor, Tensor], None]
    count_ties: Callable[[Tensor, Tensor], None]
    locate: Callable[[Tensor, Tensor, Tensor], None]


def select(k: int, entries: int, cells: int, device: torch.device, passes: Passes) -> tuple[Tensor, Tensor]:
    """Boundary of the k largest of so many entries in so many cells: value float32 () and index int64 ()."""
    state = new_state(device)
    histogram = torch.zeros(BINS, dtype=torch.int64, device=device)
    value = torch.empty((), dtype=torch.float32, device=device)
    index = torch.empty((), dtype=torch.int64, device=device)
    capacity = max(LEAST_CANDIDATES, entries // SHARE // 16 * 16)
    # Ties are counted only where there are no candidates, so both have the same memory.
    storage = torch.empty(max(3 * capacity, cells), dtype=torch.int32, device=device)
    found_bits, found_index, ties = storage[:capacity], storage[capacity : 3 * capacity].view(torch.int64), storage

    passes.sample(state, histogram)
    widen_bracket_kernel[(1,)](histogram, state, k, entries, capacity, **ONE_PROGRAM)
    passes.sample(state, histogram)
    close_bracket_kernel[(1,)](histogram, state, **ONE_PROGRAM)
    passes.collect(state, found_bits, found_index, capacity)
    index_passes = -(-max(1, (entries - 1).bit_length()) // NARROWER.value)
    choose_kernel[(1,)](found_bits, found_index, state, value, index, k, capacity, index_passes, **CHOICE)

    for _ in range(3):
        passes.count(state, histogram)
        pick_bucket_kernel[(1,)](histogram, state, **ONE_PROGRAM)
    passes.count_ties(state, ties)
    find_cell_kernel[(1,)](ties, state, cells, **CELL_SEARCH)
    passes.locate(state, value, index)
    return value, index
