"""||B A||_F^2 of every pair of a step from two r x r Gram matrices, one launch and a small sum (docs/method.md, D)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradpruner.kernels.device import TRITON, TRITON_DTYPES, common_alignment, on_device_of, table_on
from gradpruner.kernels.numeric import widen

# Rank tiles: the first that holds every rank of the step, or the last, several times. A tile that holds them all reads
# each factor once.
RANK_TILES = {2: (16, 32, 64), 4: (16, 32, 64), 8: (16, 32)}  # by the bytes of an entry: float64 takes more registers
LAUNCH = {
    16: {"BLOCK": 128, "num_warps": 4, "num_stages": 3, "enable_fp_fusion": False},
    32: {"BLOCK": 32, "num_warps": 4, "num_stages": 3, "enable_fp_fusion": False},
    64: {"BLOCK": 32, "num_warps": 8, "num_stages": 3, "enable_fp_fusion": False},
}
SUM = {"num_warps": 4, "enable_fp_fusion": False}
# Some for every processor, also where a step has one large pair; fewer where each leaves large matrices to be added.
PROGRAMS = {16: 1024, 32: 512, 64: 264}
WIDENED_IN_KERNEL = TRITON >= (3, 8)  # before, no float64 dot compiles whose operand was loaded as 16 bits
# AMD's compiler before 3.8 chooses matrix cores for float64 and then cannot lower them. For an instruction size that
# float64 does not have it takes plain multiplications.
ON_HIP: dict[str, int] = {} if TRITON >= (3, 8) else {"matrix_instr_nonkdim": 32}
LEAST_BLOCKS = 4  # of a program, so that writing its Gram matrices stays small beside reading its factors


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
    """One TILE x TILE piece of both Gram matrices of one pair over one part of its columns and rows, in float64.

    Products of float32 values are exact in float64, whose dot runs on the tensor cores of every target
    (AMD's: see ON_HIP).
    table rows: address of a (rank, n_in), address of b (n_out, rank), rank, n_in, n_out.
    grams: float64 (pairs, tiles, tiles, splits, 2, TILE, TILE).
    """
    pid = tl.program_id(0).to(tl.int64)
    split = (pid % splits).to(tl.int32)
    piece = pid // splits
    row = table + piece // (tiles * tiles) * 5
    p = (piece // tiles % tiles).to(tl.int32) * TILE + tl.arange(0, TILE)
    q = (piece % tiles).to(tl.int32) * TILE + tl.arange(0, TILE)
    a = tl.multiple_of(tl.load(row).to(tl.pointer_type(DTYPE)), ALIGN)
    b = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(DTYPE)), ALIGN)
    rank = tl.load(row + 2) // RANK_STEP * RANK_STEP  # the same number, known to be a multiple
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
    """Add the parts of one piece in their order, multiply both Gram matrices entry by entry and sum, float64."""
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
    """Into how many parts each of so many pieces of Gram matrices is split, the longest side being that long."""
    return max(1, min(triton.cdiv(PROGRAMS[tile], pieces), triton.cdiv(longest, LAUNCH[tile]["BLOCK"] * LEAST_BLOCKS)))


def gram_norm(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """||b_i a_i||_F^2 of every pair, float64 (n,); a_i (r_i, in_i), b_i (out_i, r_i) (source: D).

    The long dimension of each pair is split over as many programs as fill a card: by the shapes of the step alone, and
    the parts are added in a fixed order, so the same step gives the same bits.
    """
    if len({t.dtype for t in (*a, *b)}) > 1:  # never within a step of one optimizer, so a copy will do
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
    """float32 copies of a step's factors, all in one buffer: two launches more per step, and not hundreds."""
    factors = [*a, *b]
    flat = torch.cat([t.reshape(-1) for t in factors]).float()
    views = [view.view(t.shape) for view, t in zip(flat.split([t.numel() for t in factors]), factors, strict=True)]
    return views[: len(a)], views[len(a) :]
