"""Boundary of the k largest entries of F, rebuilt from its factors in every pass (METHOD section 3).

F is never in memory whole. A cell is one row of one tile: ordered by row and then by tile, the cells
follow the flat index.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gradpruner.kernels.device import on_device_of
from gradpruner.kernels.factor_tile import TILE, factor_tile, tile_origin
from gradpruner.kernels.selection import add_counts, count_buckets, positive_bits, select, store_boundary


@triton.jit
def factor_count_kernel(
    a,
    b,
    state,
    histogram,
    steps,
    rank,
    n_out,
    n_in,
    SHIFT: tl.constexpr,
    BINS: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    RANK: tl.constexpr,
):
    """Count the entries of one tile by the bits of one pass."""
    row, col = tile_origin(n_in, ROWS, COLS)
    f = factor_tile(a, b, steps, rank, n_out, n_in, row, col, ROWS, COLS, RANK)
    bits = tl.reshape(positive_bits(f), (ROWS * COLS,))
    add_counts(count_buckets(bits, state, SHIFT, BINS, FIRST), histogram, BINS)


@triton.jit
def factor_count_ties_kernel(
    a,
    b,
    state,
    ties,
    steps,
    rank,
    n_out,
    n_in,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    RANK: tl.constexpr,
):
    """Count the entries that equal the value in each row of one tile."""
    row, col = tile_origin(n_in, ROWS, COLS)
    f = factor_tile(a, b, steps, rank, n_out, n_in, row, col, ROWS, COLS, RANK)
    tie = positive_bits(f) == tl.load(state).to(tl.int32)
    rows = row + tl.arange(0, ROWS)
    cells = rows.to(tl.int64) * tl.cdiv(n_in, COLS) + col // COLS
    tl.store(ties + cells, tl.sum(tie.to(tl.int32), axis=1), mask=rows < n_out)


@triton.jit
def factor_locate_kernel(
    a,
    b,
    state,
    value,
    index,
    steps,
    rank,
    n_out,
    n_in,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    RANK: tl.constexpr,
):
    """Find the last kept tie in its row of its tile. One program."""
    col_tiles = tl.cdiv(n_in, COLS)
    cell = tl.load(state + 2)
    tie_row = (cell // col_tiles).to(tl.int32)
    # The tile as every other pass cut it, so that the row is rebuilt with the same bits.
    row = tie_row // ROWS * ROWS
    col = (cell % col_tiles).to(tl.int32) * COLS
    f = factor_tile(a, b, steps, rank, n_out, n_in, row, col, ROWS, COLS, RANK)
    tie = (positive_bits(f) == tl.load(state).to(tl.int32)) & (row + tl.arange(0, ROWS) == tie_row)[:, None]
    first = tie_row.to(tl.int64) * n_in + col
    store_boundary(tl.sum(tie.to(tl.int32), axis=0), first, state, value, index)


def factor_threshold(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`threshold` of the F that a (t, r, in) and b (t, out, r) stand for (METHOD section 3)."""
    steps, rank, n_in = a.shape
    n_out = b.shape[1]
    sizes = (steps, rank, n_out, n_in)
    col_tiles = triton.cdiv(n_in, TILE["COLS"])
    grid = (triton.cdiv(n_out, TILE["ROWS"]) * col_tiles,)

    def count(state: Tensor, histogram: Tensor, which: dict) -> None:
        factor_count_kernel[grid](a, b, state, histogram, *sizes, **which, **TILE)

    def count_ties(state: Tensor, ties: Tensor) -> None:
        factor_count_ties_kernel[grid](a, b, state, ties, *sizes, **TILE)

    def locate(state: Tensor, value: Tensor, index: Tensor) -> None:
        factor_locate_kernel[(1,)](a, b, state, value, index, *sizes, **TILE)

    with on_device_of(a):
        return select(k, n_out * col_tiles, a.device, count, count_ties, locate)
