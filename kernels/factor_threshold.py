"""Boundary of the k largest entries of F, rebuilt from its factors in every pass (METHOD section 3).

F is never in memory whole. A cell is one row of one tile: ordered by row and then by tile, the cells
follow the flat index.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gradpruner.kernels.bracket import collect
from gradpruner.kernels.device import on_device_of
from gradpruner.kernels.factor_tile import TILE, factor_tile, tile_count, tile_launch, tile_offsets, tile_origin
from gradpruner.kernels.histogram import add_counts, positive_bits, store_boundary, unless_done, window_counts
from gradpruner.kernels.selection import PROGRAMS, Passes, select
from gradpruner.kernels.selection_state import BASE, BINS, CELL, DONE

SCATTER = tl.constexpr(7919)  # a prime: no width of a matrix is a multiple of it times 64


@triton.jit
def sampled_tile(n, n_out, n_in, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The n-th tile of the sample. Rows take turns, and columns are scattered evenly over each turn.

    Entries of one row, and of one column, are alike: the sample has as much of every row and every column.
    """
    row_tiles = tl.cdiv(n_out, ROWS)
    col_tiles = tl.cdiv(n_in, COLS)
    row = n % row_tiles
    return row * col_tiles + (row * SCATTER + n // row_tiles) % col_tiles


@triton.jit(do_not_specialize=["steps", "rank"])
def factor_count_kernel(
    a,
    b,
    state,
    histogram,
    steps,
    rank,
    n_out,
    n_in,
    SAMPLE: tl.constexpr,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK_STEP: tl.constexpr,
    ONE_SLICE: tl.constexpr,
):
    """Count the entries of the window: of the tiles of the sample, zeros too, or the positive ones of all tiles."""
    counts = tl.zeros((BINS,), tl.int32)
    if SAMPLE:
        tiles = tl.num_programs(0)
    else:
        tiles = unless_done(tl.cdiv(n_out, ROWS) * tl.cdiv(n_in, COLS), state)
    n = tl.program_id(0)
    while n < tiles:
        tile = sampled_tile(n, n_out, n_in, ROWS, COLS) if SAMPLE else n
        row, col = tile_origin(tile, n_in, ROWS, COLS)
        f = factor_tile(a, b, steps, rank, n_out, n_in, row, col, ROWS, COLS, PRECISION, RANK_STEP, ONE_SLICE)
        bits = positive_bits(f)
        if SAMPLE:
            _, _, counted = tile_offsets(row, col, n_out, n_in, ROWS, COLS)
        else:
            counted = bits > 0
        counts += window_counts(tl.reshape(bits, (ROWS * COLS,)), tl.reshape(counted, (ROWS * COLS,)), state, BINS)
        n += tl.num_programs(0)
    add_counts(counts, histogram, BINS)


@triton.jit(do_not_specialize=["steps", "rank", "capacity"])
def factor_collect_kernel(
    a,
    b,
    state,
    found_bits,
    found_index,
    capacity,
    steps,
    rank,
    n_out,
    n_in,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK_STEP: tl.constexpr,
    ONE_SLICE: tl.constexpr,
):
    """Count the entries of one tile above the bracket and append those inside it."""
    row, col = tile_origin(tl.program_id(0), n_in, ROWS, COLS)
    f = factor_tile(a, b, steps, rank, n_out, n_in, row, col, ROWS, COLS, PRECISION, RANK_STEP, ONE_SLICE)
    first = row.to(tl.int64) * n_in + col
    collect(positive_bits(f), first, n_in, state, found_bits, found_index, capacity, ROWS, COLS)


@triton.jit(do_not_specialize=["steps", "rank"])
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
    PRECISION: tl.constexpr,
    RANK_STEP: tl.constexpr,
    ONE_SLICE: tl.constexpr,
):
    """Count the entries that equal the value in each row of every tile."""
    col_tiles = tl.cdiv(n_in, COLS)
    tiles = unless_done(tl.cdiv(n_out, ROWS) * col_tiles, state)
    tile = tl.program_id(0)
    while tile < tiles:
        row, col = tile_origin(tile, n_in, ROWS, COLS)
        f = factor_tile(a, b, steps, rank, n_out, n_in, row, col, ROWS, COLS, PRECISION, RANK_STEP, ONE_SLICE)
        tie = positive_bits(f) == tl.load(state + BASE).to(tl.int32)
        rows = row + tl.arange(0, ROWS)
        cells = rows.to(tl.int64) * col_tiles + col // COLS
        tl.store(ties + cells, tl.sum(tie.to(tl.int32), axis=1), mask=rows < n_out)
        tile += tl.num_programs(0)


@triton.jit(do_not_specialize=["steps", "rank"])
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
    PRECISION: tl.constexpr,
    RANK_STEP: tl.constexpr,
    ONE_SLICE: tl.constexpr,
):
    """Find the last kept tie in its row of its tile. One program."""
    if tl.load(state + DONE) == 0:
        col_tiles = tl.cdiv(n_in, COLS)
        cell = tl.load(state + CELL)
        tie_row = (cell // col_tiles).to(tl.int32)
        # The tile as every other pass cut it, so that the row is rebuilt with the same bits.
        row = tie_row // ROWS * ROWS
        col = (cell % col_tiles).to(tl.int32) * COLS
        f = factor_tile(a, b, steps, rank, n_out, n_in, row, col, ROWS, COLS, PRECISION, RANK_STEP, ONE_SLICE)
        tie = positive_bits(f) == tl.load(state + BASE).to(tl.int32)
        tie = tie & (row + tl.arange(0, ROWS) == tie_row)[:, None]
        first = tie_row.to(tl.int64) * n_in + col
        store_boundary(tl.sum(tie.to(tl.int32), axis=0), first, state, value, index)


def factor_threshold(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`threshold` of the F that a (t, r, in) and b (t, out, r) stand for (METHOD section 3)."""
    steps, rank, n_in = a.shape
    n_out = b.shape[1]
    sizes = (steps, rank, n_out, n_in)
    launch = tile_launch([(rank, a.dtype)])
    row_tiles, col_tiles = triton.cdiv(n_out, TILE["ROWS"]), triton.cdiv(n_in, TILE["COLS"])
    tiles = tile_count(n_out, n_in)
    sampled = (min(tiles, 2 * max(row_tiles, col_tiles)),)  # each row and each column of tiles about twice
    walking = (min(tiles, PROGRAMS),)

    def count(grid: tuple[int], sample: bool, state: Tensor, histogram: Tensor) -> None:
        factor_count_kernel[grid](a, b, state, histogram, *sizes, SAMPLE=sample, BINS=BINS, **launch)

    def collect_all(state: Tensor, bits: Tensor, index: Tensor, capacity: int) -> None:
        factor_collect_kernel[(tiles,)](a, b, state, bits, index, capacity, *sizes, **launch)

    passes = Passes(
        sample=lambda state, histogram: count(sampled, True, state, histogram),
        collect=collect_all,
        count=lambda state, histogram: count(walking, False, state, histogram),
        count_ties=lambda state, ties: factor_count_ties_kernel[walking](a, b, state, ties, *sizes, **launch),
        locate=lambda state, value, index: factor_locate_kernel[(1,)](a, b, state, value, index, *sizes, **launch),
    )
    with on_device_of(a):
        return select(k, n_out * n_in, n_out * col_tiles, a.device, passes)
