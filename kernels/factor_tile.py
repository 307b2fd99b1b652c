"""One tile of F = sum over steps of (b_i a_i) ** 2, the only place where it is computed (METHOD section 3).

Selection and merge must rebuild F bit for bit alike. They do because both call this function with the tile,
the number of warps and the options of `TILE`: the products of a step are summed over the rank in slices of
RANK in ascending order, squared, and added in the order of the steps. `enable_fp_fusion` is off, so that no
compiler turns `f + g * g` into a fused multiply-add in one kernel and not in another; the fused operations
inside a dot are explicit and stay.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gradpruner.kernels.device import INTERPRETED
from gradpruner.kernels.numeric import widen

# One stage: the loop over a rank is too short to prefetch in, and what a pipeline holds would spill registers.
# A narrower tile spills too: the assembler then trades a few registers for a second block on the processor.
TILE = {"ROWS": 64, "COLS": 64, "RANK": 16, "num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}

# The interpreter's dot is wrong on bfloat16. In float32 the products are exact too, as on tensor cores.
WIDEN_FACTORS = tl.constexpr(INTERPRETED)


@triton.jit
def tile_origin(n_in, ROWS: tl.constexpr, COLS: tl.constexpr):
    """First row and first column of this program's tile, int32."""
    col_tiles = tl.cdiv(n_in, COLS)
    pid = tl.program_id(0)
    return pid // col_tiles * ROWS, pid % col_tiles * COLS


@triton.jit
def tile_offsets(row, col, n_out, n_in, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Flat index of a tile's first entry (int64), the distance of every entry from it, and which are inside.

    Distances fit in 32 bits where flat indices do not, and take half the registers.
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
    RANK: tl.constexpr,
):
    """F of the tile whose first row and column are given, float32 (ROWS, COLS), zero outside the matrix.

    a: address of (steps, rank, n_in), b: of (steps, n_out, rank), float32 or bfloat16.
    """
    down = tl.arange(0, ROWS)[:, None]
    right = tl.arange(0, COLS)[None, :]
    k = tl.arange(0, RANK)
    f = tl.zeros((ROWS, COLS), tl.float32)
    # Addresses advance by scalars, so that offsets within a tile stay within 32 bits.
    a_step = a + col
    b_step = b + row.to(tl.int64) * rank
    for _ in range(steps):
        g = tl.zeros((ROWS, COLS), tl.float32)
        a_slice = a_step
        b_slice = b_step
        for start in range(0, rank, RANK):
            b_tile = tl.load(
                b_slice + (down * rank + k[None, :]),
                mask=(row + down < n_out) & (start + k[None, :] < rank),
                other=0.0,
            )
            a_tile = tl.load(
                a_slice + (k[:, None] * n_in + right),
                mask=(start + k[:, None] < rank) & (col + right < n_in),
                other=0.0,
            )
            if WIDEN_FACTORS:
                a_tile, b_tile = widen(a_tile), widen(b_tile)
            g = tl.dot(b_tile, a_tile, g, input_precision="ieee")
            a_slice += RANK * n_in
            b_slice += RANK
        f += g * g
        a_step += rank.to(tl.int64) * n_in
        b_step += rank.to(tl.int64) * n_out
    return f
