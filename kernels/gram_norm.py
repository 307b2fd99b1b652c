"""||B A||_F^2 of every pair of a step from two r x r Gram matrices, one launch (METHOD D)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradpruner.kernels.device import TRITON_DTYPES, common_alignment, on_device_of, table_on
from gradpruner.kernels.numeric import widen

LAUNCH = {"BLOCK": 64, "num_warps": 4, "enable_fp_fusion": False}
RANK_TILES = (16, 32)  # the first that holds every rank of the step, or the last, several times


@triton.jit
def gram_norm_kernel(
    table, partial, tiles, DTYPE: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    """One TILE x TILE piece of both Gram matrices of one pair, multiplied and summed, all in float64.

    Products of float32 values are exact in float64, whose dot runs on the tensor cores of every target.
    table rows: address of a (rank, n_in), address of b (n_out, rank), rank, n_in, n_out.
    """
    pid = tl.program_id(0)
    row = table + (pid // (tiles * tiles)) * 5
    p = (pid // tiles % tiles) * TILE + tl.arange(0, TILE)
    q = (pid % tiles) * TILE + tl.arange(0, TILE)
    a = tl.multiple_of(tl.load(row).to(tl.pointer_type(DTYPE)), ALIGN)
    b = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(DTYPE)), ALIGN)
    rank = tl.load(row + 2)
    n_in = tl.multiple_of(tl.load(row + 3), ALIGN)
    n_out = tl.load(row + 4)

    gram_a = tl.zeros((TILE, TILE), tl.float64)
    for start in range(0, n_in, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = k[None, :] < n_in
        left = tl.load(a + p[:, None] * n_in + k[None, :], mask=(p[:, None] < rank) & inside, other=0.0)
        right = tl.load(a + q[:, None] * n_in + k[None, :], mask=(q[:, None] < rank) & inside, other=0.0)
        gram_a = tl.dot(widen(left).to(tl.float64), tl.trans(widen(right).to(tl.float64)), gram_a, out_dtype=tl.float64)

    gram_b = tl.zeros((TILE, TILE), tl.float64)
    for start in range(0, n_out, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = k[:, None] < n_out
        left = tl.load(b + k[:, None] * rank + p[None, :], mask=(p[None, :] < rank) & inside, other=0.0)
        right = tl.load(b + k[:, None] * rank + q[None, :], mask=(q[None, :] < rank) & inside, other=0.0)
        gram_b = tl.dot(tl.trans(widen(left).to(tl.float64)), widen(right).to(tl.float64), gram_b, out_dtype=tl.float64)

    tl.store(partial + pid, tl.sum(tl.sum(gram_a * gram_b, axis=1), axis=0))


def gram_norm(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """||b_i a_i||_F^2 of every pair, float64 (n,); a_i (r_i, in_i), b_i (out_i, r_i) (source: D)."""
    if len({t.dtype for t in (*a, *b)}) > 1:  # never within a step of one optimizer, so a copy will do
        a, b = [t.double() for t in a], [t.double() for t in b]
    device = a[0].device
    rows = [[x.data_ptr(), y.data_ptr(), x.shape[0], x.shape[1], y.shape[0]] for x, y in zip(a, b, strict=True)]
    largest = max(row[2] for row in rows)
    tile = next((size for size in RANK_TILES if largest <= size), RANK_TILES[-1])
    tiles = max(1, triton.cdiv(largest, tile))
    partial = torch.empty(len(rows), tiles * tiles, dtype=torch.float64, device=device)
    with on_device_of(a[0]):
        gram_norm_kernel[(partial.numel(),)](
            table_on(device, rows),
            partial,
            tiles,
            TRITON_DTYPES[a[0].dtype],
            common_alignment(number for row in rows for number in (row[0], row[1], row[3])),
            tile,
            **LAUNCH,
        )
    return partial.sum(1)
