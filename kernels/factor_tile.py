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

TILE = {"ROWS": 64, "COLS": 64, "RANK": 16, "num_warps": 4, "enable_fp_fusion": False}

# The interpreter's dot is wrong on bfloat16. In float32 the products are exact too, as on tensor cores.
WIDEN_FACTORS = tl.constexpr(INTERPRETED)


@triton.jit
def factor_tile(
    a,
    b,
    steps,
    rank,
    n_out,
    n_in,
    rows,
    cols,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    RANK: tl.constexpr,
):
    """F at the given rows and columns, float32 (ROWS, COLS), zero outside the matrix.

    a: address of (steps, rank, n_in), b: of (steps, n_out, rank), float32 or bfloat16.
    """
    f = tl.zeros((ROWS, COLS), tl.float32)
    for _ in range(steps):
        g = tl.zeros((ROWS, COLS), tl.float32)
        for start in range(0, rank, RANK):
            k = start + tl.arange(0, RANK)
            left = tl.load(
                b + rows[:, None].to(tl.int64) * rank + k[None, :],
                mask=(rows[:, None] < n_out) & (k[None, :] < rank),
                other=0.0,
            )
            right = tl.load(
                a + k[:, None].to(tl.int64) * n_in + cols[None, :],
                mask=(k[:, None] < rank) & (cols[None, :] < n_in),
                other=0.0,
            )
            if WIDEN_FACTORS:
                left, right = widen(left), widen(right)
            g = tl.dot(left, right, g, input_precision="ieee")
        f += g * g
        a += rank.to(tl.int64) * n_in
        b += rank.to(tl.int64) * n_out
    return f
