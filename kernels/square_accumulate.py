"""igia += grad ** 2, one streaming pass (docs/method.md, P eq. 3)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gradpruner.kernels.device import on_device_of
from gradpruner.kernels.numeric import widen

LAUNCH = {"BLOCK": 2048, "num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def square_accumulate_kernel(igia, grad, entries, BLOCK: tl.constexpr):
    """One block of consecutive entries."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < entries
    g = widen(tl.load(grad + at, mask=inside, other=0.0)).to(tl.float32)
    old = tl.load(igia + at, mask=inside, other=0.0)
    tl.store(igia + at, old + g * g, mask=inside)


def square_accumulate_(igia: Tensor, grad: Tensor) -> None:
    """igia += grad ** 2; igia float32, grad the same shape in any float dtype (source: P eq. 3)."""
    entries = igia.numel()
    with on_device_of(igia):
        square_accumulate_kernel[(triton.cdiv(entries, LAUNCH["BLOCK"]),)](igia, grad, entries, **LAUNCH)
