"""igia += (b a) ** 2 without building b a (METHOD P eq. 2 and 3)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gradpruner.kernels.device import on_device_of
from gradpruner.kernels.factor_tile import TILE, factor_tile


@triton.jit
def outer_square_accumulate_kernel(
    igia, a, b, rank, n_out, n_in, ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr
):
    """One tile of igia."""
    col_tiles = tl.cdiv(n_in, COLS)
    pid = tl.program_id(0)
    rows = pid // col_tiles * ROWS + tl.arange(0, ROWS)
    cols = pid % col_tiles * COLS + tl.arange(0, COLS)
    f = factor_tile(a, b, 1, rank, n_out, n_in, rows, cols, ROWS, COLS, RANK)
    at = igia + rows[:, None].to(tl.int64) * n_in + cols[None, :]
    inside = (rows[:, None] < n_out) & (cols[None, :] < n_in)
    tl.store(at, tl.load(at, mask=inside, other=0.0) + f, mask=inside)


def outer_square_accumulate_(igia: Tensor, a: Tensor, b: Tensor) -> None:
    """igia += (b @ a) ** 2; igia float32 (out, in), a (r, in), b (out, r) (source: P eq. 2 and 3)."""
    n_out, n_in = igia.shape
    grid = (triton.cdiv(n_out, TILE["ROWS"]) * triton.cdiv(n_in, TILE["COLS"]),)
    with on_device_of(igia):
        outer_square_accumulate_kernel[grid](igia, a, b, a.shape[0], n_out, n_in, **TILE)
