"""Compute one tile of the importance that factors stand for.

It is F = sum over i of (b_i @ a_i) ** 2. The factors are a (steps, rank, n_in) and b (steps, n_out, rank). No other
code computes F on a GPU.

Selection and merge must rebuild F with the same bits. They do, because both call `factor_tile` with the same tile, the
same number of warps and the same options (`tile_launch`). The products of a step are summed over the rank in slices of
one width per dtype, in ascending order. Then the sum is squared and added in the order of the steps, by one explicit
fused multiply-add. A slice past the rank adds exact zeros. So a launch that serves donors of several ranks changes
nothing.

The tile is not tuned at run time. Its shape decides in what order the hardware adds, and so it decides the bits.
64 x 64 over four warps is the smallest tile whose slices of the factors (1 and 2 KB) are one 16-byte copy per thread.
It keeps f and g in 64 registers, so that several blocks share a processor and hide each other's waits.

Source: docs/method.md, section 1, "Importance of an entry", and section 3.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl

from gradpruner.kernels.device import INTERPRETED, TRITON
from gradpruner.kernels.numeric import widen

# How float32 factors are multiplied. Per entry and step at rank 8, 3 x TF32 takes 48 operations, of which an H100's
# tensor cores do 495e12 per second. Plain float32 takes 16 operations, of which it does 67e12 per second: 2.5 times as
# long. 3 x TF32 leaves less than 2 ** -21 of a product out. AMD's matrix cores multiply float32 as it is. bfloat16
# factors are exact in each case.
PRECISION = "ieee" if torch.version.hip else "tf32x3"

# enable_fp_fusion is off, so that no compiler fuses operations in one kernel that it leaves apart in another.
TILE = {
    "ROWS": 64,
    "COLS": 64,
    "PRECISION": PRECISION,
    "num_warps": 4,
    "num_stages": 3,
    "enable_fp_fusion": False,
}

# The narrowest slice of the rank that `tl.dot` takes, by dtype. In bfloat16, rank 8 is padded to 16. Triton before 3.8
# pads float32 too, since its narrowest slice is 16 for every dtype.
SLICES = {torch.float32: 8 if TRITON >= (3, 8) else 16, torch.bfloat16: 16}
SLICE_FLOAT32, SLICE_BFLOAT16 = tl.constexpr(SLICES[torch.float32]), tl.constexpr(SLICES[torch.bfloat16])

# The interpreter's dot is wrong in bfloat16. It is done in float32, where the products are exact, as on tensor cores.
WIDEN_FACTORS = tl.constexpr(INTERPRETED)


def tile_launch(factors: Iterable[tuple[int, torch.dtype]]) -> dict:
    """Return the constants and options of a launch.

    RANK_STEP is the largest power of two, up to 16, that divides every rank. ONE_SLICE says whether every rank fits
    one slice.

    Args:
        factors: rank and dtype of all factors that the launch serves.
    """
    pairs = list(factors)
    step = next(size for size in (16, 8, 4, 2, 1) if all(rank % size == 0 for rank, _ in pairs))
    return TILE | {"RANK_STEP": step, "ONE_SLICE": all(rank <= SLICES[dtype] for rank, dtype in pairs)}


def tile_count(n_out: int, n_in: int) -> int:
    """Return how many tiles cover a matrix.

    Args:
        n_out: rows of the matrix.
        n_in: columns.
    """
    return triton.cdiv(n_out, TILE["ROWS"]) * triton.cdiv(n_in, TILE["COLS"])


@triton.jit
def tile_origin(tile, n_in, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the first row and the first column of a tile, int32."""
    col_tiles = tl.cdiv(n_in, COLS)
    return tile // col_tiles * ROWS, tile % col_tiles * COLS


@triton.jit
def tile_offsets(row, col, n_out, n_in, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return where the entries of a tile are.

    These are the flat index of the first entry (int64), the distance of every entry from it, and which entries are
    inside the matrix. Distances fit in 32 bits where flat indices do not, and take half the registers.
    """
    down = tl.arange(0, ROWS)[:, None]
    right = tl.arange(0, COLS)[None, :]
    inside = (row + down < n_out) & (col + right < n_in)
    return row.to(tl.int64) * n_in + col, down * n_in + right, inside


@triton.jit
def factor_tile(
    a,
    b,
    steps,
    rank,
    n_out,
    n_in,
    row,
    col,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK_STEP: tl.constexpr,
    ONE_SLICE: tl.constexpr,
):
    """Return F of one tile, float32 (ROWS, COLS). It is zero outside the matrix.

    a: address of (steps, rank, n_in), float32 or bfloat16.
    b: address of (steps, n_out, rank), of the same dtype.
    rank: not a constexpr.
    row, col: the first row and the first column of the tile.
    """
    SLICE: tl.constexpr = SLICE_FLOAT32 if a.dtype.element_ty == tl.float32 else SLICE_BFLOAT16
    down = tl.arange(0, ROWS)[:, None]
    right = tl.arange(0, COLS)[None, :]
    k = tl.arange(0, SLICE)
    rank = (
        rank // RANK_STEP * RANK_STEP
    )  # the same number, now known to be a multiple, so that rows of b are loaded 16 bytes at once
    f = tl.zeros((ROWS, COLS), tl.float32)
    g = tl.zeros((ROWS, COLS), tl.float32)
    # Addresses advance by scalars, so that offsets in a tile fit in 32 bits.
    a_at = a + col
    b_at = b + row.to(tl.int64) * rank
    slices = 1 if ONE_SLICE else tl.cdiv(rank, SLICE)
    done = (slices - 1) * SLICE
    a_next = (rank - done).to(tl.int64) * n_in
    b_next = rank.to(tl.int64) * n_out - done
    start = 0
    # Steps and slices are one loop, so that the next step is being copied while this one is squared.
    for _ in range(steps * slices):
        b_tile = tl.load(
            b_at + (down * rank + k[None, :]), mask=(row + down < n_out) & (start + k[None, :] < rank), other=0.0
        )
        a_tile = tl.load(
            a_at + (k[:, None] * n_in + right), mask=(start + k[:, None] < rank) & (col + right < n_in), other=0.0
        )
        if WIDEN_FACTORS:
            a_tile, b_tile = widen(a_tile), widen(b_tile)
        if ONE_SLICE:
            g = tl.dot(b_tile, a_tile, input_precision=PRECISION)
            f = tl.fma(g, g, f)
            a_at += a_next
            b_at += b_next
        else:
            g = tl.dot(b_tile, a_tile, g, input_precision=PRECISION)
            last = start + SLICE >= rank
            if last:
                f = tl.fma(g, g, f)
                g = tl.zeros((ROWS, COLS), tl.float32)
            a_at += tl.where(last, a_next, SLICE * n_in)
            b_at += tl.where(last, b_next, SLICE)
            start = tl.where(last, 0, start + SLICE)
    return f
