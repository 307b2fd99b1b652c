"""What the kernels of a selection leave for each other on the device.

It is `state`, int64 (PLACES,), whose places have the names below, and the histogram. Both begin as zeros. So one memset
on the device prepares a selection, and nothing is copied from the host.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

SAMPLES = tl.constexpr(0)  # passes over the sample that have ended
BASE = tl.constexpr(1)  # the window of the second pass over the sample: its smallest bits,
SHIFT = tl.constexpr(2)  # and log2 of the width of its buckets
LOW = tl.constexpr(3)  # the lower end of the bracket, inclusive; until it is known, its rank in the sample
HIGH = tl.constexpr(4)  # the upper end, likewise
VALUE_BITS = tl.constexpr(5)  # how many bits a distance of values in the bracket needs
ABOVE = tl.constexpr(6)  # entries above the bracket
FOUND = tl.constexpr(7)  # entries in the bracket, including those for which the buffer had no room
TAKEN = tl.constexpr(8)  # rounds that have narrowed the window of keys
FLOOR = tl.constexpr(9)  # the smallest key of that window
WANTED = tl.constexpr(10)  # how many of its keys are still wanted, smallest first
WITHIN = tl.constexpr(11)  # how many keys it holds
GATHERED = tl.constexpr(12)  # how many of them have been copied to one place
ENDED = tl.constexpr(13)  # programs of the current launch that have done their part
DONE = tl.constexpr(14)  # 1 once the boundary is stored
PLACES = 16

LARGEST = tl.constexpr(0x7FFFFFFF)  # no float32 has larger bits
ALL_BITS = tl.constexpr(31)  # of a positive float32
BINS = tl.constexpr(2048)  # buckets of a histogram
WIDEST = tl.constexpr(20)  # log2 of the width of a bucket when all 31 bits are counted in BINS buckets
NARROWER = tl.constexpr(11)  # log2 of BINS: a round decides so many bits of a key
# Programs use different copies of the histogram, since additions to one address wait for each other.
COPIES = tl.constexpr(8)


def new_state(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the state before the first pass, and the histogram, int64 (COPIES * BINS,)."""
    numbers = torch.zeros(PLACES + COPIES.value * BINS.value, dtype=torch.int64, device=device)
    return numbers[:PLACES], numbers[PLACES:]
