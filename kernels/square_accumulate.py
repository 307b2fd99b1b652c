"""Compute igia += grad ** 2 in one pass over both. They have one shape, which may be any.

Source: docs/method.md, section 1, "Importance of an entry".
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gradpruner.kernels.device import on_device_of
from gradpruner.kernels.numeric import widen

LAUNCH = {"BLOCK": 2048, "num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def square_accumulate_kernel(igia, grad, entries, BLOCK: tl.constexpr):
    """Add the squares of one block of consecutive entries."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < entries
    g = widen(tl.load(grad + at, mask=inside, other=0.0)).to(tl.float32)
    old = tl.load(igia + at, mask=inside, other=0.0)
    tl.store(igia + at, old + g * g, mask=inside)


def square_accumulate_(igia: Tensor, grad: Tensor) -> None:
    """Compute igia += grad ** 2. See `gradpruner.ops.square_accumulate_`.

    Args:
        igia, grad: as in the op.
    """
    entries = igia.numel()
    with on_device_of(igia):
        square_accumulate_kernel[(triton.cdiv(entries, LAUNCH["BLOCK"]),)](igia, grad, entries, **LAUNCH)
