"""Merge donors into a weight (out, in), with each donor's importance given by its factors.

F = sum over i of (b_i @ a_i) ** 2, of a (t, r, in) and b (t, out, r), is rebuilt tile by tile in registers. It is never
in memory. Each tile of the weight is read once and written once for up to `GROUP` donors.

Source: docs/method.md, section 3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradpruner.kernels.device import common_alignment, on_device_of, table_on
from gradpruner.kernels.factor_tile import factor_tile, tile_count, tile_launch, tile_offsets, tile_origin
from gradpruner.kernels.merge_rule import add_agreeing, as_stored, keeps, may_agree
from gradpruner.kernels.numeric import widen
from gradpruner.kernels.sign_merge import float64_bits

GROUP = 32  # donors of one launch: their masks are the bits of one integer per entry
ROW = tl.constexpr(9)  # numbers in a row of the table


@triton.jit
def factor_sign_merge_kernel(
    weight,
    before,
    after,
    table,
    donors,
    n_out,
    n_in,
    FLOATS: tl.constexpr,
    HALVES: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK_STEP: tl.constexpr,
    ONE_SLICE: tl.constexpr,
):
    """Merge at most GROUP donors into one tile of the weight.

    before: the sums that an earlier launch left, in the dtype that they are computed in, or None.
    after: where to leave the sums for a later launch, or None.
    FLOATS, HALVES: whether some donor has float32 factors, and whether some donor has bfloat16 factors.
    table: one row per donor. It has the addresses of donor, a, b, value and index, then steps, rank, whether the
    factors are bfloat16, and the bits of the scale as float64.

    First the masks of all donors are made. Then the weight is merged, in two halves. So the registers for the masks
    and those for the weight are not needed at the same time.
    """
    row, col = tile_origin(tl.program_id(0), n_in, ROWS, COLS)
    masks = tl.zeros((ROWS, COLS), tl.int32)
    down = row + tl.arange(0, ROWS)
    right = col + tl.arange(0, COLS)
    for k in range(donors):
        line = table + k * ROW
        a = tl.load(line + 1)
        b = tl.load(line + 2)
        value = tl.load(tl.load(line + 3).to(tl.pointer_type(tl.float32)))
        index = tl.load(tl.load(line + 4).to(tl.pointer_type(tl.int64)))
        steps = tl.load(line + 5).to(tl.int32)
        rank = tl.load(line + 6).to(tl.int32)
        if FLOATS and HALVES:
            if tl.load(line + 7) != 0:
                f = _tile_at(
                    a,
                    b,
                    tl.bfloat16,
                    steps,
                    rank,
                    n_out,
                    n_in,
                    row,
                    col,
                    ALIGN,
                    ROWS,
                    COLS,
                    PRECISION,
                    RANK_STEP,
                    ONE_SLICE,
                )
            else:
                f = _tile_at(
                    a,
                    b,
                    tl.float32,
                    steps,
                    rank,
                    n_out,
                    n_in,
                    row,
                    col,
                    ALIGN,
                    ROWS,
                    COLS,
                    PRECISION,
                    RANK_STEP,
                    ONE_SLICE,
                )
        else:
            DTYPE: tl.constexpr = tl.bfloat16 if HALVES else tl.float32
            f = _tile_at(
                a, b, DTYPE, steps, rank, n_out, n_in, row, col, ALIGN, ROWS, COLS, PRECISION, RANK_STEP, ONE_SLICE
            )
        # Compared by row and column of the last kept tie. A flat index for every entry would fill the registers.
        last_row = (index // n_in).to(tl.int32)
        last_col = (index % n_in).to(tl.int32)
        at_or_before = (down < last_row)[:, None] | ((down == last_row)[:, None] & (right <= last_col)[None, :])
        masks |= keeps(f, value, at_or_before).to(tl.int32) << k
    top, bottom = tl.split(tl.permute(tl.reshape(masks, (2, ROWS // 2, COLS)), (1, 2, 0)))
    _merge_rows(top, weight, before, after, table, donors, n_out, n_in, row, col, ALIGN, ROWS // 2, COLS)
    _merge_rows(bottom, weight, before, after, table, donors, n_out, n_in, row + ROWS // 2, col, ALIGN, ROWS // 2, COLS)


@triton.jit
def _merge_rows(
    masks,
    weight,
    before,
    after,
    table,
    donors,
    n_out,
    n_in,
    row,
    col,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Merge the donors into one half of the tile: the rows that the masks belong to."""
    first, offset, inside = tile_offsets(row, col, n_out, n_in, ROWS, COLS)
    raw = tl.load(weight + first + offset, mask=inside, other=0.0)
    original = widen(raw)
    merged = original
    if before is not None:
        merged = tl.load(before + first + offset, mask=inside, other=0.0)
    masks = tl.where(may_agree(original), masks, 0)
    for k in range(donors):
        line = table + k * ROW
        donor = tl.multiple_of(tl.load(line).to(weight.dtype), ALIGN)
        scale = tl.load(line + 8).to(tl.float64, bitcast=True).to(original.dtype)
        v = widen(tl.load(donor + first + offset, mask=inside, other=0.0))
        merged = add_agreeing(merged, original, v, ((masks >> k) & 1) != 0, scale)
    if after is not None:
        tl.store(after + first + offset, merged, mask=inside)
    else:
        tl.store(weight + first + offset, as_stored(merged, original, raw), mask=inside)


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
    PRECISION: tl.constexpr,
    RANK_STEP: tl.constexpr,
    ONE_SLICE: tl.constexpr,
):
    """Rebuild one tile of a donor's importance from the addresses of its factors."""
    a = tl.multiple_of(a.to(tl.pointer_type(DTYPE)), ALIGN)
    b = tl.multiple_of(b.to(tl.pointer_type(DTYPE)), ALIGN)
    return factor_tile(a, b, steps, rank, n_out, n_in, row, col, ROWS, COLS, PRECISION, RANK_STEP, ONE_SLICE)


def factor_sign_merge_(
    weight: Tensor,
    donors: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    values: list[Tensor],
    indices: list[Tensor],
    scales: list[float],
) -> None:
    """Merge donors whose importance is given by factors, into a weight.

    Args:
        weight, donors, a, b, values, indices, scales: as in `gradpruner.ops.factor_sign_merge_`.
    """
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
    launch = tile_launch((x.shape[1], x.dtype) for x in a)
    align = common_alignment(address for row in rows for address in row[:3])
    sums = None
    with on_device_of(weight):
        for start in range(0, len(rows), GROUP):
            group = rows[start : start + GROUP]
            last = start + GROUP >= len(rows)
            before = sums
            if not last and sums is None:
                sums = torch.empty_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
            factor_sign_merge_kernel[(tile_count(n_out, n_in),)](
                weight,
                before,
                None if last else sums,
                table_on(weight.device, group),
                len(group),
                n_out,
                n_in,
                not all(halves),
                any(halves),
                align,
                **launch,
            )
