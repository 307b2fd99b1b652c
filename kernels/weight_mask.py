"""Make and apply masks of one bit per entry of a weight (out, in).

Entry (i, j) is kept where bit j % 8 of byte (i, j // 8) is set.

Source: docs/method.md, section 7.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gradpruner.kernels.device import on_device_of

LAUNCH = {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def packed(keep, BLOCK: tl.constexpr):
    """Return the bytes of a mask for BLOCK flat entries, uint8 (BLOCK / 8,)."""
    bits = tl.reshape(keep.to(tl.int32), (BLOCK // 8, 8)) << tl.arange(0, 8)[None, :]
    return tl.sum(bits, axis=1).to(tl.uint8)


@triton.jit
def pack_kernel(mask, keep, n_in, BLOCK: tl.constexpr):
    """Pack one block of one row. keep: uint8 (out, in), 0 or 1."""
    blocks = tl.cdiv(n_in, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    bytes_per_row = tl.cdiv(n_in, 8)
    byte = tl.program_id(0) % blocks * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    kept = tl.load(keep + row * n_in + column, mask=column < n_in, other=0)
    tl.store(mask + row * bytes_per_row + byte, packed(kept, BLOCK), mask=byte < bytes_per_row)


@triton.jit
def apply_mask_kernel(weight, mask, n_in, BLOCK: tl.constexpr):
    """Zero one block of one row where the mask does not keep it."""
    blocks = tl.cdiv(n_in, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    bytes_per_row = tl.cdiv(n_in, 8)
    byte = tl.program_id(0) % blocks * (BLOCK // 8) + tl.arange(0, BLOCK // 8)[:, None]
    column = byte * 8 + tl.arange(0, 8)[None, :]
    bits = tl.load(mask + row * bytes_per_row + byte, mask=byte < bytes_per_row, other=0).to(tl.int32)
    at = weight + row * n_in + column
    raw = tl.load(at, mask=column < n_in, other=0.0)
    tl.store(at, tl.where((bits >> tl.arange(0, 8)[None, :]) & 1 != 0, raw, 0.0), mask=column < n_in)


def pack(mask: Tensor, keep: Tensor) -> None:
    """Pack a mask of one byte per entry into one bit per entry.

    Args:
        mask: the result, uint8 (out, ceil(in / 8)).
        keep: 1 where an entry is kept, else 0, uint8 (out, in).
    """
    n_out, n_in = keep.shape
    pack_kernel[(n_out * triton.cdiv(n_in, LAUNCH["BLOCK"]),)](mask, keep, n_in, **LAUNCH)


def apply_mask_(weight: Tensor, mask: Tensor) -> None:
    """Zero the entries that a mask does not keep. See `gradpruner.ops.apply_mask_`.

    Args:
        weight, mask: as in the op.
    """
    n_out, n_in = weight.shape
    with on_device_of(weight):
        apply_mask_kernel[(n_out * triton.cdiv(n_in, LAUNCH["BLOCK"]),)](weight, mask, n_in, **LAUNCH)
