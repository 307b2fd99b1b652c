"""Merge donors into a weight, where they are important and agree with it in sign.

This takes one pass. Weight, donors and importances have one shape, which may be any.

Source: docs/method.md, section 3.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl
from torch import Tensor

from gradpruner.kernels.device import common_alignment, on_device_of, table_on
from gradpruner.kernels.merge_rule import add_agreeing, as_stored, keeps, may_agree
from gradpruner.kernels.numeric import widen

# Without fused multiply-adds `merged + scale * donor` rounds twice, as it does in torch.
LAUNCH = {"BLOCK": 2048, "num_warps": 8, "enable_fp_fusion": False}


@triton.jit
def sign_merge_kernel(weight, table, donors, entries, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """Merge all donors into one block of consecutive entries.

    table: one row per donor: addresses of donor, igia, value and index, then the bits of the scale as float64.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    inside = first + offset < entries
    raw = tl.load(weight + first + offset, mask=inside, other=0.0)
    original = widen(raw)
    merged = original
    open_to_donors = may_agree(original)
    for _ in range(donors):
        donor = tl.multiple_of(tl.load(table).to(weight.dtype), ALIGN)
        igia = tl.multiple_of(tl.load(table + 1).to(tl.pointer_type(tl.float32)), ALIGN)
        value = tl.load(tl.load(table + 2).to(tl.pointer_type(tl.float32)))
        index = tl.load(tl.load(table + 3).to(tl.pointer_type(tl.int64)))
        scale = tl.load(table + 4).to(tl.float64, bitcast=True).to(original.dtype)
        v = widen(tl.load(donor + first + offset, mask=inside, other=0.0))
        f = tl.load(igia + first + offset, mask=inside, other=0.0)
        last = tl.minimum(tl.maximum(index - first, -1), BLOCK).to(tl.int32)
        merged = add_agreeing(merged, original, v, open_to_donors & keeps(f, value, offset <= last), scale)
        table += 5
    tl.store(weight + first + offset, as_stored(merged, original, raw), mask=inside)


def float64_bits(number: float) -> int:
    """Return the bits of a float64 as a signed integer, for a table of integers."""
    return struct.unpack("q", struct.pack("d", number))[0]


def sign_merge_(
    weight: Tensor,
    donors: list[Tensor],
    igias: list[Tensor],
    values: list[Tensor],
    indices: list[Tensor],
    scales: list[float],
) -> None:
    """Merge donors into a weight. See `gradpruner.ops.sign_merge_`.

    Args:
        weight, donors, igias, values, indices, scales: as in the op.
    """
    rows = [
        [v.data_ptr(), f.data_ptr(), value.data_ptr(), index.data_ptr(), float64_bits(scale)]
        for v, f, value, index, scale in zip(donors, igias, values, indices, scales, strict=True)
    ]
    entries = weight.numel()
    with on_device_of(weight):
        sign_merge_kernel[(triton.cdiv(entries, LAUNCH["BLOCK"]),)](
            weight,
            table_on(weight.device, rows),
            len(rows),
            entries,
            common_alignment(address for row in rows for address in row[:2]),
            **LAUNCH,
        )
