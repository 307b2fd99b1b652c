"""The numbers that the kernels of a selection leave for each other on the device: `state`, int64 (PLACES,)."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from gradpruner.kernels.device import table_on

BASE = tl.constexpr(0)  # the window that is counted: its first bits,
LAST = tl.constexpr(1)  # its last bits,
SHIFT = tl.constexpr(2)  # and log2 of the width of its buckets
WANTED = tl.constexpr(3)  # how many are still to be taken from the window, largest first
CELL = tl.constexpr(4)  # cell of the last kept tie
NTH = tl.constexpr(5)  # which of the cell's ties that is, from 1; 0: nothing is kept
LOW = tl.constexpr(6)  # the bracket, inclusive; while it is being found, the sample's ranks of its two ends
HIGH = tl.constexpr(7)
ABOVE = tl.constexpr(8)  # entries above the bracket
FOUND = tl.constexpr(9)  # entries in the bracket, also those that the buffer could not take
DONE = tl.constexpr(10)  # 1 once the boundary is stored
PLACES = 11

LARGEST = tl.constexpr(0x7FFFFFFF)  # no float32 has larger bits
BINS = 2048  # buckets of a histogram
WIDEST = tl.constexpr(20)  # log2 of the width of a bucket when all 31 bits are counted in BINS buckets
NARROWER = tl.constexpr(11)  # log2 of BINS: by so much a bucket of one pass is wider than one of the next


def new_state(device: torch.device) -> Tensor:
    """The state before the first pass: the window is everything."""
    numbers = [0] * PLACES
    numbers[LAST.value], numbers[SHIFT.value] = LARGEST.value, WIDEST.value
    return table_on(device, [numbers])
