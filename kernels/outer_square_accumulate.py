"""igia += (b a) ** 2 without building b a (docs/method.md, P eq. 2 and 3)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gradpruner.kernels.device import on_device_of
from gradpruner.kernels.factor_tile import factor_tile, tile_count, tile_launch, tile_offsets, tile_origin


@triton.jit(do_not_specialize=["rank"])
def outer_square_accumulate_kernel(
    igia,
    a,
    b,
    rank,
    n_out,
    n_in,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PRECISION: tl.constexpr,
    RANK_STEP: tl.constexpr,
    ONE_SLICE: tl.constexpr,
):
    """One tile of igia."""
    row, col = tile_origin(tl.program_id(0), n_in, ROWS, COLS)
    f = factor_tile(a, b, 1, rank, n_out, n_in, row, col, ROWS, COLS, PRECISION, RANK_STEP, ONE_SLICE)
    first, offset, inside = tile_offsets(row, col, n_out, n_in, ROWS, COLS)
    at = igia + first + offset
    tl.store(at, tl.load(at, mask=inside, other=0.0) + f, mask=inside)


def outer_square_accumulate_(igia: Tensor, a: Tensor, b: Tensor) -> None:
    """igia += (b @ a) ** 2; igia float32 (out, in), a (r, in), b (out, r) (source: P eq. 2 and 3)."""
    n_out, n_in = igia.shape
    launch = tile_launch([(a.shape[0], a.dtype)])
    with on_device_of(igia):
        outer_square_accumulate_kernel[(tile_count(n_out, n_in),)](igia, a, b, a.shape[0], n_out, n_in, **launch)
