"""Find the boundary of the k largest entries of an importance that is given by its factors.

F = sum over i of (b_i @ a_i) ** 2, of a (t, r, in) and b (t, out, r), is rebuilt in every pass. It is never in memory
as a whole. The passes are those of `selection`. A cell is one row of one tile. Cells that are ordered by row, then by
tile, are in the order of the flat index.

Source: docs/method.md, section 3, step 1.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gradpruner.kernels.bracket import add_sample, collect, end_sample, sample_window
from gradpruner.kernels.candidates import candidates_hold, narrow
from gradpruner.kernels.device import on_device_of
from gradpruner.kernels.factor_tile import TILE, factor_tile, tile_count, tile_launch, tile_offsets, tile_origin
from gradpruner.kernels.histogram import add_values, positive_bits, take_bucket, value_window
from gradpruner.kernels.last_program import is_last
from gradpruner.kernels.selection import PROGRAMS, Buffers, Passes, select
from gradpruner.kernels.selection_state import DONE, FLOOR, LARGEST, WANTED
from gradpruner.kernels.ties import find_cell, store_boundary

SCATTER = tl.constexpr(7919)  # a prime, so that in practice no matrix is a multiple of it times 64 wide
SHORT_ROW = tl.constexpr(16)  # rows of 8 and fewer take more registers


@triton.jit
def sampled_tile(n, n_out, n_in, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the n-th tile of the sample.

    Rows of tiles take turns, and columns are scattered evenly over each turn. Entries of one row are similar, and so
    are entries of one column. So the sample has equally much of every row and of every column.
    """
    row_tiles = tl.cdiv(n_out, ROWS)
    col_tiles = tl.cdiv(n_in, COLS)
    row = n % row_tiles
    return row * col_tiles + (row * SCATTER + n // row_tiles) % col_tiles


@triton.jit(do_not_specialize=["k", "capacity", "steps", "rank", "n_out"])
def factor_sample_kernel(
    a,
    b,
    state,
    histogram,
    k,
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
    """Count the entries of one tile of the sample. Zeros count too."""
    samples, base, shift = sample_window(state)
    tile = sampled_tile(tl.program_id(0), n_out, n_in, ROWS, COLS)
    row, col = tile_origin(tile, n_in, ROWS, COLS)
    f = factor_tile(a, b, steps, rank, n_out, n_in, row, col, ROWS, COLS, PRECISION, RANK_STEP, ONE_SLICE)
    _, _, counted = tile_offsets(row, col, n_out, n_in, ROWS, COLS)
    add_sample(positive_bits(f), counted, base, shift, histogram)
    entries = n_out.to(tl.int64) * n_in
    end_sample(samples, base, shift, histogram, state, k, entries, capacity)


@triton.jit(do_not_specialize=["capacity", "index_bits", "steps", "rank", "n_out"])
def factor_collect_kernel(
    a,
    b,
    state,
    keys,
    capacity,
    index_bits,
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
    """Count the entries of one tile above the bracket, and append those inside it."""
    row, col = tile_origin(tl.program_id(0), n_in, ROWS, COLS)
    f = factor_tile(a, b, steps, rank, n_out, n_in, row, col, ROWS, COLS, PRECISION, RANK_STEP, ONE_SLICE)
    first = row.to(tl.int64) * n_in + col
    # Each row of the tile is cut into rows of SHORT_ROW entries.
    row = tl.arange(0, ROWS * COLS // SHORT_ROW)
    far = row // (COLS // SHORT_ROW) * n_in + row % (COLS // SHORT_ROW) * SHORT_ROW
    bits = tl.reshape(positive_bits(f), (ROWS * COLS // SHORT_ROW, SHORT_ROW))
    collect(bits, first, far, state, keys, capacity, index_bits)


@triton.jit(do_not_specialize=["k", "capacity", "index_bits", "steps", "rank", "n_out"])
def factor_narrow_kernel(
    a,
    b,
    state,
    histogram,
    keys,
    few_keys,
    value,
    index,
    k,
    capacity,
    index_bits,
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
    """Do one round among the candidates, or among all entries if the bracket failed."""
    if tl.load(state + DONE) == 0:
        hold, wanted = candidates_hold(state, k, capacity, index_bits)
        if hold:
            narrow(keys, few_keys, state, histogram, value, index, wanted, index_bits)
        else:
            taken, floor, wanted, left, shift = value_window(state, k)
            tiles = tl.cdiv(n_out, ROWS) * tl.cdiv(n_in, COLS)
            tile = tl.program_id(0)
            while tile < tiles:
                row, col = tile_origin(tile, n_in, ROWS, COLS)
                f = factor_tile(a, b, steps, rank, n_out, n_in, row, col, ROWS, COLS, PRECISION, RANK_STEP, ONE_SLICE)
                add_values(positive_bits(f), floor, left, shift, histogram)
                tile += tl.num_programs(0)
            if is_last(state):
                take_bucket(histogram, state, taken, floor, wanted, shift)


@triton.jit(do_not_specialize=["steps", "rank", "n_out"])
def factor_settle_kernel(
    a,
    b,
    state,
    ties,
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
    """If the bracket failed: count the ties in each row of every tile, and find the last kept."""
    if tl.load(state + DONE) == 0:
        bits = (tl.load(state + FLOOR) ^ LARGEST).to(tl.int32)
        wanted = tl.load(state + WANTED)
        col_tiles = tl.cdiv(n_in, COLS)
        tiles = tl.cdiv(n_out, ROWS) * col_tiles
        tile = tl.program_id(0)
        while tile < tiles:
            row, col = tile_origin(tile, n_in, ROWS, COLS)
            f = factor_tile(a, b, steps, rank, n_out, n_in, row, col, ROWS, COLS, PRECISION, RANK_STEP, ONE_SLICE)
            tie = positive_bits(f) == bits
            rows = row + tl.arange(0, ROWS)
            cells = rows.to(tl.int64) * col_tiles + col // COLS
            tl.store(ties + cells, tl.sum(tie.to(tl.int32), axis=1), mask=rows < n_out)
            tile += tl.num_programs(0)
        if is_last(state):
            cell, nth = find_cell(ties, wanted, n_out.to(tl.int64) * col_tiles)
            tie_row = (cell // col_tiles).to(tl.int32)
            # The same tile as in every other pass, so that the row is rebuilt with the same bits.
            row = tie_row // ROWS * ROWS
            col = (cell % col_tiles).to(tl.int32) * COLS
            f = factor_tile(a, b, steps, rank, n_out, n_in, row, col, ROWS, COLS, PRECISION, RANK_STEP, ONE_SLICE)
            tie = (positive_bits(f) == bits) & (row + tl.arange(0, ROWS) == tie_row)[:, None]
            first = tie_row.to(tl.int64) * n_in + col
            store_boundary(tl.sum(tie.to(tl.int32), axis=0), first, nth, bits, value, index)


def factor_threshold(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the boundary of the importance that factors stand for. See the op.

    Args:
        a, b, k: as in `gradpruner.ops.factor_threshold`.
    """
    steps, rank, n_in = a.shape
    n_out = b.shape[1]
    shape = (steps, rank, n_out, n_in)
    tile = tile_launch([(rank, a.dtype)])
    row_tiles, col_tiles = triton.cdiv(n_out, TILE["ROWS"]), triton.cdiv(n_in, TILE["COLS"])
    tiles = tile_count(n_out, n_in)
    sampled = (min(tiles, 2 * max(row_tiles, col_tiles)),)  # takes each row and each column of tiles about twice
    walking = (min(tiles, PROGRAMS),)

    def sample(x: Buffers) -> None:
        factor_sample_kernel[sampled](a, b, x.state, x.histogram, k, x.capacity, *shape, **tile)

    def collect_all(x: Buffers) -> None:
        factor_collect_kernel[(tiles,)](a, b, x.state, x.keys, x.capacity, x.index_bits, *shape, **tile)

    def narrow_once(x: Buffers) -> None:
        sizes = (k, x.capacity, x.index_bits, *shape)
        factor_narrow_kernel[walking](a, b, x.state, x.histogram, x.keys, x.few_keys, x.value, x.index, *sizes, **tile)

    def settle(x: Buffers) -> None:
        factor_settle_kernel[walking](a, b, x.state, x.ties, x.value, x.index, *shape, **tile)

    with on_device_of(a):
        return select(n_out * n_in, n_out * col_tiles, a.device, Passes(sample, collect_all, narrow_once, settle))
