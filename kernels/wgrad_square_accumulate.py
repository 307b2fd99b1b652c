"""The fused weight gradient g = dy^T x, squared where it is computed (docs/method.md, section 1, estimator `exact`).

Tiles are not split along the tokens, as a GEMM with few tiles otherwise would be: the square of a sum is not the sum
of the squares of its parts, so a tile of g has to be whole where it is squared. What fills the card is the order of the
tiles: GROUP of a column in turn, whose tokens then lie in the second-level cache.

Two blocks share a processor, so that one reads and writes its tile of igia while the other multiplies: with few tokens
the two take about as long. That is why the tile is no larger than half of a processor's registers and shared memory,
and why its end is taken in parts.

Not tuned at run time either: the tile decides in what order products are added, so a choice by timing would make the
scores depend on what else the machine did; and each trial would add into igia and grad.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradpruner.kernels.device import INTERPRETED, on_device_of
from gradpruner.kernels.factor_tile import PRECISION, tile_offsets
from gradpruner.kernels.numeric import narrow, widen

# By the bytes of an entry of x and dy. A large tile: what a tile reads for each product shrinks with its sides. Thin
# slices of tokens, several on the way: on an H200, 32 tokens in four stages took 0.87 to 0.97 of the time that 64 in
# three took.
LAUNCH = {
    2: {"ROWS": 128, "COLS": 128, "TOKENS": 32, "num_warps": 8, "num_stages": 4},
    4: {"ROWS": 128, "COLS": 64, "TOKENS": 16, "num_warps": 8, "num_stages": 3},
    8: {"ROWS": 32, "COLS": 32, "TOKENS": 16, "num_warps": 4, "num_stages": 2},
}
# What AMD has otherwise: four stages would fill the 64 KiB that its processor shares out.
ON_HIP = {2: {"TOKENS": 64, "num_stages": 2}, 4: {}, 8: {}}
if torch.version.hip:
    LAUNCH = {size: launch | ON_HIP[size] for size, launch in LAUNCH.items()}
OPTIONS = {"PRECISION": PRECISION, "enable_fp_fusion": False}
FINITE = {"BLOCK": 8192, "num_warps": 16, "enable_fp_fusion": False}
PROGRAMS = 256  # of finite_kernel, at most: two a processor of an H100, with 16 KB each on the way

BOUNDS = tl.constexpr(PROGRAMS)
GROUP = tl.constexpr(8)  # tiles of a column taken together, so that the second-level cache holds their tokens
WIDEN_OPERANDS = tl.constexpr(INTERPRETED)  # the interpreter's dot is wrong on bfloat16


# Lengths of batches differ from step to step: a kernel specialised on them would be compiled anew within a run.
@triton.jit(do_not_specialize=["tokens"])
def finite_kernel(x, dy, bounds, tokens, n_out, n_in, BLOCK: tl.constexpr):
    """Each program stores inf, or 0 if a part of x or dy that it reads is not finite. Each is read once."""
    # products, not counts from the host: what n_in is a multiple of, they are, so 16 bytes are loaded at once
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
    """One tile of g over all tokens, and its squares, or its absolute values if ABSOLUTE.

    igia, grad: None where not wanted. bounds: float32 (programs,), only what is below them all enters igia: inf, and 0
    where x or dy is not finite. partial: float64, one sum of squares a tile, or None where not wanted.
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
        # here, so that it is under way while the products are added
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
        dy_at += TOKENS * n_out  # pointers advance, so no offset passes 32 bits
        x_at += TOKENS * n_in

    # In four parts: the squares of a whole tile in float64 would not fit the registers beside it. By columns, because
    # tensor cores leave a row of the tile with few threads: no part has to be moved between them.
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
    """Add some columns of g's tile into grad and their squares or absolute values into igia. Returns the sum of the
    squares, float64."""
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
        # A NaN fails the comparison too. What does not enter is written back as it was: masks that depend on the data
        # would break every load and store into single entries.
        before = tl.load(igia + first + distance, mask=inside, other=0.0)
        tl.store(igia + first + distance, tl.where(added < limit, before + added, before), mask=inside)
    # Outside there may be 0 * inf, so the sum selects. float64: a square may overflow float32 and be summed.
    exact = tl.where(inside, g, 0.0).to(tl.float64)
    return tl.sum(exact * exact)  # over both axes at once: Triton 3.6 does not compile a sum of rows for Blackwell


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
        bounds = None if igia is None else bounds_of(x, dy)
        programs = 0 if bounds is None else bounds.numel()
        wgrad_kernel[(tiles,)](
            igia, grad, x, dy, bounds, partial, programs, tokens, n_out, n_in, ABSOLUTE=False, **launch, **OPTIONS
        )
    return partial.sum()


def bounds_of(x: Tensor, dy: Tensor) -> Tensor:
    """inf from each program of `finite_kernel` that met finite entries only, else 0; float32 (programs,) on the device.

    They have to be known before the first tile is added: a tile with finite entries may be done before another meets
    the first NaN, and igia is to be left whole. So x and dy are read once more, 1 part in 100 of what the product
    costs. One bound a program, because one for all would have to be filled by a launch of its own.
    """
    programs = min(triton.cdiv(max(x.numel(), dy.numel()), FINITE["BLOCK"]), PROGRAMS)
    bounds = torch.empty(programs, dtype=torch.float32, device=x.device)
    if programs:
        finite_kernel[(programs,)](x, dy, bounds, x.shape[0], dy.shape[1], x.shape[1], **FINITE)
    return bounds
