"""Compute the weight gradient g = dy^T x, and square it in registers.

The inputs are x (tokens, in) and dy (tokens, out). The gradient of a frozen weight is never in memory.

Tiles of g are not split along the tokens, as a matrix product with few tiles otherwise would be. The square of a sum is
not the sum of the squares of its parts, so a tile of g must be complete before it is squared. The order of the tiles
keeps the GPU busy: GROUP tiles of a column follow each other, and their tokens stay in the second-level cache.

Two blocks share a processor. One reads and writes its tile of igia while the other multiplies. With few tokens, both
take about as long. So the tile takes no more than half of a processor's registers and shared memory, and the end of a
tile is done in parts.

The tile is not tuned at run time. It decides in what order products are added, so a choice by timing would make the
scores depend on what else the machine does. Each trial would also add into igia and grad.

Source: docs/method.md, section 1 (the estimator "exact").
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradpruner.kernels.device import INTERPRETED, on_device_of
from gradpruner.kernels.factor_tile import PRECISION, tile_offsets
from gradpruner.kernels.numeric import narrow, widen

# By the bytes of an entry of x and dy. The tile is large, because the larger it is, the less it reads per product. The
# slices of tokens are thin, and several are being copied at a time: on an H200, 32 tokens in four stages took 0.87 to
# 0.97 of the time of 64 tokens in three stages.
LAUNCH = {
    2: {"ROWS": 128, "COLS": 128, "TOKENS": 32, "num_warps": 8, "num_stages": 4},
    4: {"ROWS": 128, "COLS": 64, "TOKENS": 16, "num_warps": 8, "num_stages": 3},
    8: {"ROWS": 32, "COLS": 32, "TOKENS": 16, "num_warps": 4, "num_stages": 2},
}
# Differences for AMD, where four stages would fill the 64 KiB of shared memory of a processor.
ON_HIP = {2: {"TOKENS": 64, "num_stages": 2}, 4: {}, 8: {}}
if torch.version.hip:
    LAUNCH = {size: launch | ON_HIP[size] for size, launch in LAUNCH.items()}
OPTIONS = {"PRECISION": PRECISION, "enable_fp_fusion": False}
FINITE = {"BLOCK": 8192, "num_warps": 16, "enable_fp_fusion": False}
PROGRAMS = 256  # of finite_kernel, at most: two per processor of an H100, each of which copies 16 KB at a time

BOUNDS = tl.constexpr(PROGRAMS)
GROUP = tl.constexpr(8)  # tiles of a column that follow each other, so that the second-level cache holds their tokens
WIDEN_OPERANDS = tl.constexpr(INTERPRETED)  # the interpreter's dot is wrong in bfloat16


# The length of batches differs from step to step. A kernel specialised on it would be compiled again and again.
@triton.jit(do_not_specialize=["tokens"])
def finite_kernel(x, dy, bounds, tokens, n_out, n_in, BLOCK: tl.constexpr):
    """Store inf, or 0 if this program's part of x or dy is not finite."""
    # Computed here, not passed by the host. So the compiler knows that they are multiples of what n_in is a multiple
    # of, and loads 16 bytes at once.
    x_entries = tokens.to(tl.int64) * n_in
    dy_entries = tokens.to(tl.int64) * n_out
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bad = tl.zeros((BLOCK,), tl.int1)
    for start in range(0, x_entries, step):
        entry = widen(tl.load(x + start + at, mask=start + at < x_entries, other=0.0))
        bad = bad | (entry - entry != 0)
    for start in range(0, dy_entries, step):
        entry = widen(tl.load(dy + start + at, mask=start + at < dy_entries, other=0.0))
        bad = bad | (entry - entry != 0)
    tl.store(bounds + tl.program_id(0), tl.where(tl.max(bad.to(tl.int32), axis=0) != 0, 0.0, float("inf")))


@triton.jit(do_not_specialize=["programs", "tokens"])
def wgrad_kernel(
    igia,
    grad,
    x,
    dy,
    bounds,
    partial,
    programs,
    tokens,
    n_out,
    n_in,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
    ABSOLUTE: tl.constexpr,
):
    """Compute one tile of g over all tokens, and add its squares.

    If ABSOLUTE, it adds the absolute values instead.

    igia, grad: as in the op. None where they are not wanted.
    bounds: float32 (programs,), what `finite_kernel` stored. What is not below all of them is not added to igia.
    partial: one sum of squares per tile, float64, or None.
    """
    pid = tl.program_id(0)
    row_tiles = tl.cdiv(n_out, ROWS)
    col_tiles = tl.cdiv(n_in, COLS)
    group_first = pid // (GROUP * col_tiles) * GROUP
    group_rows = tl.minimum(row_tiles - group_first, GROUP)
    in_group = pid % (GROUP * col_tiles)
    row = (group_first + in_group % group_rows) * ROWS
    col = in_group // group_rows * COLS
    rows = row + tl.arange(0, ROWS)
    cols = col + tl.arange(0, COLS)

    precision: tl.constexpr = PRECISION if x.dtype.element_ty == tl.float32 else "ieee"
    wide: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    g = tl.zeros((ROWS, COLS), wide)
    if igia is not None:
        program = tl.arange(0, BOUNDS)
        # loaded here, so that it arrives while the products are added
        every_bound = tl.load(bounds + program, mask=program < programs, other=float("inf"))
    token = tl.arange(0, TOKENS)
    dy_at = dy + token[:, None] * n_out + rows[None, :]
    x_at = x + token[:, None] * n_in + cols[None, :]
    for start in range(0, tokens, TOKENS):
        there = start + token[:, None] < tokens
        left = tl.load(dy_at, mask=there & (rows[None, :] < n_out), other=0.0)
        right = tl.load(x_at, mask=there & (cols[None, :] < n_in), other=0.0)
        if WIDEN_OPERANDS:
            left, right = widen(left), widen(right)
        g = tl.dot(tl.trans(left), right, g, input_precision=precision, out_dtype=wide)
        dy_at += TOKENS * n_out  # pointers advance, so that offsets fit in 32 bits
        x_at += TOKENS * n_in

    # The end is done in four parts, because the squares of a whole tile in float64 would not fit in the registers
    # beside it. The parts are columns. Tensor cores leave a row of the tile with few threads, so no part has to move
    # between threads.
    limit = None
    if igia is not None:
        limit = tl.min(every_bound, axis=0)
    QUARTER: tl.constexpr = COLS // 4
    left_half, right_half = tl.split(tl.permute(tl.reshape(g, (ROWS, 2, 2 * QUARTER)), (0, 2, 1)))
    first, second = tl.split(tl.permute(tl.reshape(left_half, (ROWS, 2, QUARTER)), (0, 2, 1)))
    third, fourth = tl.split(tl.permute(tl.reshape(right_half, (ROWS, 2, QUARTER)), (0, 2, 1)))
    total = _add_columns(first, igia, grad, limit, row, col, n_out, n_in, ROWS, QUARTER, ABSOLUTE)
    total += _add_columns(second, igia, grad, limit, row, col + QUARTER, n_out, n_in, ROWS, QUARTER, ABSOLUTE)
    total += _add_columns(third, igia, grad, limit, row, col + 2 * QUARTER, n_out, n_in, ROWS, QUARTER, ABSOLUTE)
    total += _add_columns(fourth, igia, grad, limit, row, col + 3 * QUARTER, n_out, n_in, ROWS, QUARTER, ABSOLUTE)
    if partial is not None:
        tl.store(partial + pid, total)


@triton.jit
def _add_columns(
    g, igia, grad, limit, row, col, n_out, n_in, ROWS: tl.constexpr, COLS: tl.constexpr, ABSOLUTE: tl.constexpr
):
    """Add some columns of a tile of g to grad, and their squares or absolute values to igia.

    The sum of the squares is returned, float64.
    """
    first, distance, inside = tile_offsets(row, col, n_out, n_in, ROWS, COLS)
    if grad is not None:
        old = tl.load(grad + first + distance, mask=inside, other=0.0)
        stored = narrow(widen(old) + widen(narrow(g, old.dtype)), old.dtype)
        tl.store(grad + first + distance, stored, mask=inside)
        g = widen(stored)
    if igia is not None:
        if ABSOLUTE:
            added = tl.abs(g).to(tl.float32)
        else:
            added = (g * g).to(tl.float32)
        # A NaN fails the comparison too. Entries to which nothing is added are written back as they were. A mask that
        # depends on the data would break every load and store into single entries.
        before = tl.load(igia + first + distance, mask=inside, other=0.0)
        tl.store(igia + first + distance, tl.where(added < limit, before + added, before), mask=inside)
    # Outside the matrix there may be 0 * inf, so these entries are left out. The sum is in float64, because it also
    # holds squares that overflow float32.
    exact = tl.where(inside, g, 0.0).to(tl.float64)
    return tl.sum(
        exact * exact
    )  # over both axes at once, since Triton 3.6 does not compile a sum of rows for Blackwell


def wgrad_square_accumulate_(igia: Tensor | None, x: Tensor, dy: Tensor, grad: Tensor | None) -> Tensor:
    """Square a weight gradient as it is computed.

    Args:
        igia, x, dy, grad: as in `gradpruner.ops.wgrad_square_accumulate_`.
    """
    tokens, n_in = x.shape
    n_out = dy.shape[1]
    launch = LAUNCH[x.element_size()]
    tiles = triton.cdiv(n_out, launch["ROWS"]) * triton.cdiv(n_in, launch["COLS"])
    partial = torch.empty(tiles, dtype=torch.float64, device=x.device)
    with on_device_of(x):
        bounds = None if igia is None else bounds_of(x, dy)
        programs = 0 if bounds is None else bounds.numel()
        wgrad_kernel[(tiles,)](
            igia, grad, x, dy, bounds, partial, programs, tokens, n_out, n_in, ABSOLUTE=False, **launch, **OPTIONS
        )
    return partial.sum()


def bounds_of(x: Tensor, dy: Tensor) -> Tensor:
    """Find out on the device whether all inputs are finite.

    This must be known before the first tile is added, because igia must stay as it was otherwise. So x and dy are read
    once more, which costs a hundredth of the product. There is one bound per program, because a common one would need
    a launch of its own to be filled.

    Args:
        x: (tokens, in).
        dy: (tokens, out).

    Returns:
        For each program of `finite_kernel` inf if its part is finite, else 0. float32 (programs,).
    """
    programs = min(triton.cdiv(max(x.numel(), dy.numel()), FINITE["BLOCK"]), PROGRAMS)
    bounds = torch.empty(programs, dtype=torch.float32, device=x.device)
    if programs:
        finite_kernel[(programs,)](x, dy, bounds, x.shape[0], dy.shape[1], x.shape[1], **FINITE)
    return bounds
