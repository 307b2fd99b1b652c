"""Compute igia += (b @ a) ** 2, without building b @ a.

The shapes are igia (out, in), a (r, in) and b (out, r).

Source: docs/method.md, section 1, "The gradient of a weight" and "Importance of an entry".
"""

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
    """Add the squares of one tile."""
    row, col = tile_origin(tl.program_id(0), n_in, ROWS, COLS)
    f = factor_tile(a, b, 1, rank, n_out, n_in, row, col, ROWS, COLS, PRECISION, RANK_STEP, ONE_SLICE)
    first, offset, inside = tile_offsets(row, col, n_out, n_in, ROWS, COLS)
    at = igia + first + offset
    tl.store(at, tl.load(at, mask=inside, other=0.0) + f, mask=inside)


def outer_square_accumulate_(igia: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute igia += (b @ a) ** 2. See `gradpruner.ops.outer_square_accumulate_`.

    Args:
        igia, a, b: as in the op.
    """
    n_out, n_in = igia.shape
    launch = tile_launch([(a.shape[0], a.dtype)])
    with on_device_of(igia):
        outer_square_accumulate_kernel[(tile_count(n_out, n_in),)](igia, a, b, a.shape[0], n_out, n_in, **launch)
