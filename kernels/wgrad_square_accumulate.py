"""The fused weight gradient g = dy^T x, squared where it is computed (METHOD D, estimator `exact`)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradpruner.kernels.device import INTERPRETED, on_device_of
from gradpruner.kernels.numeric import narrow, widen

# By the bytes of an entry of x and dy.
LAUNCH = {
    2: {"ROWS": 128, "COLS": 64, "TOKENS": 64, "num_warps": 8, "num_stages": 3, "enable_fp_fusion": False},
    4: {"ROWS": 64, "COLS": 64, "TOKENS": 16, "num_warps": 4, "num_stages": 3, "enable_fp_fusion": False},
    8: {"ROWS": 32, "COLS": 32, "TOKENS": 16, "num_warps": 4, "num_stages": 2, "enable_fp_fusion": False},
}
GROUP = tl.constexpr(8)  # tiles of a column taken together, so that the second-level cache holds their tokens

WIDEN_OPERANDS = tl.constexpr(INTERPRETED)  # the interpreter's dot is wrong on bfloat16


@triton.jit
def wgrad_square_kernel(
    igia,
    grad,
    x,
    dy,
    limit,
    partial,
    tokens,
    n_out,
    n_in,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One tile of g over all tokens, and its squares.

    igia, grad: None where not wanted. limit: float32 (), only squares below it enter igia: inf, or 0 where
    x or dy is not finite. partial: float64, one a tile.
    """
    pid = tl.program_id(0)
    row_tiles = tl.cdiv(n_out, ROWS)
    col_tiles = tl.cdiv(n_in, COLS)
    group_first = pid // (GROUP * col_tiles) * GROUP
    group_rows = tl.minimum(row_tiles - group_first, GROUP)
    in_group = pid % (GROUP * col_tiles)
    rows = (group_first + in_group % group_rows) * ROWS + tl.arange(0, ROWS)
    cols = in_group // group_rows * COLS + tl.arange(0, COLS)

    wide: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    g = tl.zeros((ROWS, COLS), wide)
    token = tl.arange(0, TOKENS)
    dy_at = dy + token[:, None] * n_out + rows[None, :]
    x_at = x + token[:, None] * n_in + cols[None, :]
    for start in range(0, tokens, TOKENS):
        there = start + token[:, None] < tokens
        left = tl.load(dy_at, mask=there & (rows[None, :] < n_out), other=0.0)
        right = tl.load(x_at, mask=there & (cols[None, :] < n_in), other=0.0)
        if WIDEN_OPERANDS:
            left, right = widen(left), widen(right)
        g = tl.dot(tl.trans(left), right, g, input_precision="ieee", out_dtype=wide)
        dy_at += TOKENS * n_out  # pointers advance, so no offset passes 32 bits
        x_at += TOKENS * n_in

    at = rows[:, None].to(tl.int64) * n_in + cols[None, :]
    inside = (rows[:, None] < n_out) & (cols[None, :] < n_in)
    if grad is not None:
        old = tl.load(grad + at, mask=inside, other=0.0)
        stored = narrow(widen(old) + widen(narrow(g, old.dtype)), old.dtype)
        tl.store(grad + at, stored, mask=inside)
        g = widen(stored)

    if igia is not None:
        square = (g * g).to(tl.float32)
        # A NaN fails the comparison too. Masked entries are not written, so they keep their bits.
        enters = inside & (square < tl.load(limit))
        tl.store(igia + at, tl.load(igia + at, mask=enters, other=0.0) + square, mask=enters)

    # Outside there may be 0 * inf, so the sum selects. float64: a square may overflow float32 and be summed.
    exact = tl.where(inside, g, 0.0).to(tl.float64)
    tl.store(partial + pid, tl.sum(tl.sum(exact * exact, axis=1), axis=0))


def wgrad_square_accumulate_(igia: Tensor | None, x: Tensor, dy: Tensor, grad: Tensor | None) -> Tensor:
    """g = dy^T x, plus grad where given; igia += g ** 2 unless x, dy or g is not finite (source: D).

    x (tokens, in), dy (tokens, out); igia float32 (out, in), grad (out, in). Returns sum(g ** 2), float64 ().
    """
    tokens, n_in = x.shape
    n_out = dy.shape[1]
    launch = LAUNCH[x.element_size()]
    tiles = triton.cdiv(n_out, launch["ROWS"]) * triton.cdiv(n_in, launch["COLS"])
    partial = torch.empty(tiles, dtype=torch.float64, device=x.device)
    with on_device_of(x):
        limit = None if igia is None else _limit(x, dy)
        wgrad_square_kernel[(tiles,)](igia, grad, x, dy, limit, partial, tokens, n_out, n_in, **launch)
    return partial.sum()


def _limit(x: Tensor, dy: Tensor) -> Tensor:
    """inf where x and dy are finite, else 0; float32 () on the device. The extremes with a NaN are NaN."""
    if x.shape[0] == 0:
        return x.new_full((), float("inf"), dtype=torch.float32)
    extremes = torch.stack([*torch.aminmax(x), *torch.aminmax(dy)])
    return torch.where(extremes.isfinite().all(), float("inf"), 0.0).to(torch.float32)
