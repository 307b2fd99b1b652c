"""`sign_merge_` with each donor's importance rebuilt tile by tile from its factors (METHOD section 3)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradpruner.kernels.device import common_alignment, on_device_of, table_on
from gradpruner.kernels.factor_tile import TILE, factor_tile, tile_offsets, tile_origin
from gradpruner.kernels.merge_rule import add_agreeing
from gradpruner.kernels.numeric import narrow, widen
from gradpruner.kernels.sign_merge import float64_bits


@triton.jit
def factor_sign_merge_kernel(
    weight,
    table,
    donors,
    n_out,
    n_in,
    FLOATS: tl.constexpr,
    HALVES: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    RANK: tl.constexpr,
):
    """One tile of the weight through all donors.

    FLOATS, HALVES: some donor has float32, bfloat16 factors. table rows: addresses of donor, a, b, value and
    index, then steps, rank, whether the factors are bfloat16, and the bits of the scale as float64.
    """
    row, col = tile_origin(n_in, ROWS, COLS)
    first, offset, inside = tile_offsets(row, col, n_out, n_in, ROWS, COLS)
    raw = tl.load(weight + first + offset, mask=inside, other=0.0)
    original = widen(raw)
    merged = original
    changed = tl.zeros((ROWS, COLS), tl.int1)
    for _ in range(donors):
        donor = tl.multiple_of(tl.load(table).to(weight.dtype), ALIGN)
        a = tl.load(table + 1)
        b = tl.load(table + 2)
        value = tl.load(tl.load(table + 3).to(tl.pointer_type(tl.float32)))
        index = tl.load(tl.load(table + 4).to(tl.pointer_type(tl.int64)))
        steps = tl.load(table + 5).to(tl.int32)
        rank = tl.load(table + 6).to(tl.int32)
        scale = tl.load(table + 8).to(tl.float64, bitcast=True).to(original.dtype)
        if FLOATS and HALVES:
            if tl.load(table + 7) != 0:
                f = _tile_at(a, b, tl.bfloat16, steps, rank, n_out, n_in, row, col, ALIGN, ROWS, COLS, RANK)
            else:
                f = _tile_at(a, b, tl.float32, steps, rank, n_out, n_in, row, col, ALIGN, ROWS, COLS, RANK)
        elif HALVES:
            f = _tile_at(a, b, tl.bfloat16, steps, rank, n_out, n_in, row, col, ALIGN, ROWS, COLS, RANK)
        else:
            f = _tile_at(a, b, tl.float32, steps, rank, n_out, n_in, row, col, ALIGN, ROWS, COLS, RANK)
        v = widen(tl.load(donor + first + offset, mask=inside, other=0.0))
        merged, changed = add_agreeing(merged, changed, original, v, f, first, offset, value, index, scale)
        table += 9
    tl.store(weight + first + offset, tl.where(changed, narrow(merged, raw.dtype), raw), mask=inside)


@triton.jit
def _tile_at(
    a,
    b,
    DTYPE: tl.constexpr,
    steps,
    rank,
    n_out,
    n_in,
    row,
    col,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    RANK: tl.constexpr,
):
    a = tl.multiple_of(a.to(tl.pointer_type(DTYPE)), ALIGN)
    b = tl.multiple_of(b.to(tl.pointer_type(DTYPE)), ALIGN)
    return factor_tile(a, b, steps, rank, n_out, n_in, row, col, ROWS, COLS, RANK)


def factor_sign_merge_(
    weight: Tensor,
    donors: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    values: list[Tensor],
    indices: list[Tensor],
    scales: list[float],
) -> None:
    """`sign_merge_` with F of a[k] (t, r, in) and b[k] (t, out, r), never in memory (METHOD section 3)."""
    halves = [x.dtype == torch.bfloat16 for x in a]
    rows = [
        [
            *(t.data_ptr() for t in (donors[k], a[k], b[k], values[k], indices[k])),
            a[k].shape[0],
            a[k].shape[1],
            int(halves[k]),
            float64_bits(scales[k]),
        ]
        for k in range(len(donors))
    ]
    n_out, n_in = weight.shape
    grid = (triton.cdiv(n_out, TILE["ROWS"]) * triton.cdiv(n_in, TILE["COLS"]),)
    with on_device_of(weight):
        factor_sign_merge_kernel[grid](
            weight,
            table_on(weight.device, rows),
            len(rows),
            n_out,
            n_in,
            not all(halves),
            any(halves),
            common_alignment(address for row in rows for address in row[:3]),
            **TILE,
        )
