"""Compute ||b_i @ a_i||_F^2 of every pair of a step, from two r x r Gram matrices per pair.

The pairs are a_i (r_i, in_i) and b_i (out_i, r_i). The norm is the sum over the entries of (b^T b) * (a a^T). One
launch computes the parts of all Gram matrices. A second one adds and multiplies them.

Source: docs/method.md, section 1, "Sums without the matrix".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradpruner.kernels.device import TRITON, TRITON_DTYPES, common_alignment, on_device_of, table_on
from gradpruner.kernels.numeric import widen

# Sides of the tiles of a Gram matrix. The first that holds every rank of the step is taken. If none does, the last is
# taken, several times. A tile that holds every rank reads each factor once.
RANK_TILES = {2: (16, 32, 64), 4: (16, 32, 64), 8: (16, 32)}  # by the bytes of an entry: float64 takes more registers
LAUNCH = {
    16: {"BLOCK": 128, "num_warps": 4, "num_stages": 3, "enable_fp_fusion": False},
    32: {"BLOCK": 32, "num_warps": 4, "num_stages": 3, "enable_fp_fusion": False},
    64: {"BLOCK": 32, "num_warps": 8, "num_stages": 3, "enable_fp_fusion": False},
}
SUM = {"num_warps": 4, "enable_fp_fusion": False}
# How many programs a launch should have, by the side of the tile. It is enough for every processor, also in a step with
# one large pair. It is less for large tiles, since every program leaves two matrices of that size to be added.
PROGRAMS = {16: 1024, 32: 512, 64: 264}
# Before 3.8, no float64 dot compiles whose operand was loaded as 16 bits.
WIDENED_IN_KERNEL = TRITON >= (3, 8)
# Before 3.8, the compiler for AMD chooses matrix cores for float64 and then fails to lower them. If it is given an
# instruction size that float64 does not have, it takes plain multiplications.
ON_HIP: dict[str, int] = {} if TRITON >= (3, 8) else {"matrix_instr_nonkdim": 32}
LEAST_BLOCKS = 4  # per program, so that writing its Gram matrices costs little beside reading its factors


@triton.jit
def gram_kernel(
    table,
    grams,
    tiles,
    splits,
    DTYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    RANK_STEP: tl.constexpr,
    ONE_TILE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute one piece of both Gram matrices of a pair.

    The piece is TILE x TILE, over a part of the pair's columns and rows. The kernel computes in float64, where products
    of float32 values are exact. The dot runs on the tensor cores of every target (for AMD see ON_HIP).

    table: one row per pair: address of a (rank, n_in), address of b (n_out, rank), rank, n_in, n_out.
    grams: the result, float64 (pairs, tiles, tiles, splits, 2, TILE, TILE).
    """
    pid = tl.program_id(0).to(tl.int64)
    split = (pid % splits).to(tl.int32)
    piece = pid // splits
    row = table + piece // (tiles * tiles) * 5
    p = (piece // tiles % tiles).to(tl.int32) * TILE + tl.arange(0, TILE)
    q = (piece % tiles).to(tl.int32) * TILE + tl.arange(0, TILE)
    a = tl.multiple_of(tl.load(row).to(tl.pointer_type(DTYPE)), ALIGN)
    b = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(DTYPE)), ALIGN)
    rank = tl.load(row + 2) // RANK_STEP * RANK_STEP  # the same number, now known to be a multiple
    n_in = tl.load(row + 3) // ALIGN * ALIGN
    n_out = tl.load(row + 4)
    at = grams + pid * (2 * TILE * TILE) + tl.arange(0, TILE)[:, None] * TILE + tl.arange(0, TILE)[None, :]

    gram = tl.zeros((TILE, TILE), tl.float64)
    part = tl.cdiv(tl.cdiv(n_in, BLOCK), splits) * BLOCK
    for start in range(split * part, tl.minimum(split * part + part, n_in), BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = k[None, :] < n_in
        left = tl.load(a + p[:, None] * n_in + k[None, :], mask=(p[:, None] < rank) & inside, other=0.0)
        left = widen(left).to(tl.float64)
        if ONE_TILE:
            right = left
        else:
            right = tl.load(a + q[:, None] * n_in + k[None, :], mask=(q[:, None] < rank) & inside, other=0.0)
            right = widen(right).to(tl.float64)
        gram = tl.dot(left, tl.trans(right), gram, out_dtype=tl.float64)
    tl.store(at, gram)

    gram = tl.zeros((TILE, TILE), tl.float64)
    part = tl.cdiv(tl.cdiv(n_out, BLOCK), splits) * BLOCK
    for start in range(split * part, tl.minimum(split * part + part, n_out), BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = k[:, None] < n_out
        left = tl.load(b + k[:, None] * rank + p[None, :], mask=(p[None, :] < rank) & inside, other=0.0)
        left = widen(left).to(tl.float64)
        if ONE_TILE:
            right = left
        else:
            right = tl.load(b + k[:, None] * rank + q[None, :], mask=(q[None, :] < rank) & inside, other=0.0)
            right = widen(right).to(tl.float64)
        gram = tl.dot(tl.trans(left), right, gram, out_dtype=tl.float64)
    tl.store(at + TILE * TILE, gram)


@triton.jit
def gram_sum_kernel(grams, partial, splits, TILE: tl.constexpr):
    """Add the parts of one piece in their order, and sum the products of both Gram matrices."""
    pid = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, TILE * TILE)
    at = grams + pid * splits * (2 * TILE * TILE) + entry
    gram_a = tl.zeros((TILE * TILE,), tl.float64)
    gram_b = tl.zeros((TILE * TILE,), tl.float64)
    for _ in range(splits):
        gram_a += tl.load(at)
        gram_b += tl.load(at + TILE * TILE)
        at += 2 * TILE * TILE
    tl.store(partial + pid, tl.sum(gram_a * gram_b, axis=0))


def split_count(pieces: int, longest: int, tile: int) -> int:
    """Return into how many parts each piece of a Gram matrix is split.

    Args:
        pieces: how many pieces there are.
        longest: the longest side of a factor in this step.
        tile: the side of a piece.
    """
    return max(1, min(triton.cdiv(PROGRAMS[tile], pieces), triton.cdiv(longest, LAUNCH[tile]["BLOCK"] * LEAST_BLOCKS)))


def gram_norm(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Compute the squared norm of the product of every pair. See `gradpruner.ops.gram_norm`.

    The long dimension of each pair is split over as many programs as fill a GPU. The split depends only on the shapes
    of the step, and the parts are added in a fixed order. So the same step gives the same bits.

    Args:
        a, b: as in the op.
    """
    if len({t.dtype for t in (*a, *b)}) > 1:  # this does not happen in a step of one optimizer, so a copy will do
        a, b = [t.double() for t in a], [t.double() for t in b]
    elif a[0].element_size() == 2 and not WIDENED_IN_KERNEL:
        a, b = _widened(a, b)
    device = a[0].device
    rows = [[x.data_ptr(), y.data_ptr(), x.shape[0], x.shape[1], y.shape[0]] for x, y in zip(a, b, strict=True)]
    largest = max(row[2] for row in rows)
    sizes = RANK_TILES[a[0].element_size()]
    tile = next((size for size in sizes if largest <= size), sizes[-1])
    launch = LAUNCH[tile] | (ON_HIP if torch.version.hip else {})
    tiles = max(1, triton.cdiv(largest, tile))
    pieces = len(rows) * tiles * tiles
    splits = split_count(pieces, max(max(row[3:]) for row in rows), tile)
    grams = torch.empty(pieces * splits * 2 * tile * tile, dtype=torch.float64, device=device)
    partial = torch.empty(len(rows), tiles * tiles, dtype=torch.float64, device=device)
    step = next(size for size in (16, 8, 4, 2, 1) if all(row[2] % size == 0 for row in rows))
    with on_device_of(a[0]):
        gram_kernel[(pieces * splits,)](
            table_on(device, rows),
            grams,
            tiles,
            splits,
            TRITON_DTYPES[a[0].dtype],
            common_alignment(number for row in rows for number in (row[0], row[1], row[3])),
            step,
            tiles == 1,
            tile,
            **launch,
        )
        gram_sum_kernel[(pieces,)](grams, partial, splits, tile, **SUM)
    return partial.sum(1)


def _widened(a: list[Tensor], b: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return float32 copies of all factors in one buffer, by two launches instead of hundreds."""
    factors = [*a, *b]
    flat = torch.cat([t.reshape(-1) for t in factors]).float()
    views = [view.view(t.shape) for view, t in zip(flat.split([t.numel() for t in factors]), factors, strict=True)]
    return views[: len(a)], views[len(a) :]
