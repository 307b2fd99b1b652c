"""Bytes and operations of every op at real shapes, ours and the released way's: counted, never measured.

Each pass over memory is one `Pass`: what it must move to and from the card's memory if caches hold what they can (every
operand once), and its operations by unit. The roofline time of a way is the sum of its passes' roofline times.

The released way (docs/method.md, C), one torch expression a pass: G = gB @ gA built densely for each step, squared,
added; the mask from a full descending argsort; donors added through masks stored as numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.ops.cases import SHAPES, STEPS
from gradpruner.kernels.gram_norm import split_count
from gradpruner.kernels.threshold import BLOCK, log_stretch

LLAMA = SHAPES["llama-8b"]
TOKENS = 4096
KEPT = 0.2
SIZE = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Card:
    """Bytes and operations a second, from the data sheets (dense, SXM)."""

    memory: float
    units: dict[str, float]


_UNITS = {"bf16": 989e12, "tf32": 495e12, "fp32": 67e12, "fp64": 67e12}  # the first two and fp64 on tensor cores
CARDS = {"H100": Card(3.35e12, _UNITS), "H200": Card(4.8e12, _UNITS)}


@dataclass(frozen=True)
class Pass:
    """One pass: bytes moved, operations by unit (a multiplication and an addition are two)."""

    bytes: float
    operations: dict[str, float]

    def seconds(self, card: Card) -> float:
        """What the slowest of memory and units needs, all at their peak and at the same time."""
        return max(self.bytes / card.memory, *(n / card.units[unit] for unit, n in self.operations.items()), 0.0)


def _move(bytes_moved: float) -> Pass:
    return Pass(bytes_moved, {"fp32": 0.0})


@dataclass(frozen=True)
class Count:
    """One op at one shape: the case of its main kernel, our passes and the released way's."""

    op: str
    shape: str
    case: str
    ours: tuple[Pass, ...]
    released: tuple[Pass, ...]


def counts() -> list[Count]:
    """Every op at every shape of the table."""
    found = [_gram(rank, dtype) for rank in (8, 64) for dtype in SIZE]
    for n_out, n_in in LLAMA.distinct:
        found += [_square(n_out, n_in), _threshold(n_out, n_in), _sign_merge(n_out, n_in), _wgrad(n_out, n_in)]
        found += [_prune(n_out, n_in, n_in), _prune(n_out, n_in, 4), _importance(n_out, n_in), _mask(n_out, n_in)]
        for rank in (8, 64):
            for dtype in SIZE:
                for op in (_outer, _factor_threshold, _factor_sign_merge, _fold):
                    found.append(op(n_out, n_in, rank, dtype))
    return sorted(found, key=lambda count: count.op)


def _factor_bytes(n_out: int, n_in: int, rank: int, dtype: str) -> float:
    return rank * (n_out + n_in) * SIZE[dtype]


def _rebuild(n_out: int, n_in: int, rank: int, dtype: str, steps: int, share: float = 1.0) -> Pass:
    """F from its factors: three TF32 products for one of float32, the rank of bfloat16 padded to 16."""
    entries = n_out * n_in * share * steps
    padded = rank if dtype == "fp32" else -(-rank // 16) * 16
    products = {"tf32": 3 * 2 * padded * entries} if dtype == "fp32" else {"bf16": 2 * padded * entries}
    return Pass(steps * _factor_bytes(n_out, n_in, rank, dtype), products | {"fp32": 2 * entries})


def _dense_step(n_out: int, n_in: int, rank: int, dtype: str) -> tuple[Pass, ...]:
    """G written; read and its square written; F and the square read and F written."""
    entries, size = n_out * n_in, SIZE[dtype]
    unit = "bf16" if dtype == "bf16" else "fp32"
    product = Pass(_factor_bytes(n_out, n_in, rank, dtype) + size * entries, {unit: 2 * rank * entries})
    return product, _move(2 * size * entries), _move((4 + size + 4) * entries)


def _argsort(entries: int) -> tuple[Pass, ...]:
    """Radix sort of float32 keys with int64 places: the places written, keys read for the histograms, then four passes
    of 8 bits that each read and write both. Then a mask of zeros written and its kept places read and set."""
    return (
        _move(8 * entries),
        _move(4 * entries),
        *[_move(2 * (4 + 8) * entries)] * 4,
        _move((4 + KEPT * 12) * entries),
    )


def _masked_add(entries: int, size: int = 2) -> tuple[Pass, ...]:
    """sign(W), sign(V), their equality, mask * V, that * equality, W + that; the mask and what it makes float32."""
    steps = (2 * size, 2 * size, 2 * size + 1, 4 + size + 4, 4 + 1 + 4, size + 4 + size)
    return tuple(_move(n * entries) for n in steps)


def _outer(n_out: int, n_in: int, rank: int, dtype: str) -> Count:
    rebuilt = _rebuild(n_out, n_in, rank, dtype, 1)
    ours = Pass(rebuilt.bytes + 8 * n_out * n_in, rebuilt.operations)
    return Count(
        "outer_square_accumulate_",
        f"{n_out}x{n_in} r={rank} {dtype}",
        f"outer_square_accumulate-{dtype}-r{rank}",
        (ours,),
        _dense_step(n_out, n_in, rank, dtype),
    )


def _factor_threshold(n_out: int, n_in: int, rank: int, dtype: str) -> Count:
    """Two passes over the sample, one over everything, and two over the candidates, 8 bytes each."""
    entries = n_out * n_in
    row_tiles, col_tiles = n_out // 64, n_in // 64
    share = min(1.0, 2 * max(row_tiles, col_tiles) / (row_tiles * col_tiles))
    sample = _rebuild(n_out, n_in, rank, dtype, STEPS, share)
    found = 0.9 * entries / 128
    whole = _rebuild(n_out, n_in, rank, dtype, STEPS)
    ours = (sample, sample, Pass(whole.bytes + 8 * found, whole.operations), _move(2 * 8 * found))
    released = (*_dense_step(n_out, n_in, rank, dtype) * STEPS, *_argsort(entries))
    shape = f"{n_out}x{n_in} t={STEPS} r={rank} {dtype}"
    return Count("factor_threshold", shape, f"factor_collect-{dtype}-r{rank}", ours, released)


def _factor_sign_merge(n_out: int, n_in: int, rank: int, dtype: str) -> Count:
    """One donor. The released way has its F and mask from before: only the addition is counted."""
    entries = n_out * n_in
    whole = _rebuild(n_out, n_in, rank, dtype, STEPS)
    ours = (Pass(whole.bytes + 6 * entries, whole.operations),)
    shape = f"{n_out}x{n_in} bf16, t={STEPS} r={rank} {dtype}"
    return Count("factor_sign_merge_", shape, f"factor_sign_merge-bf16-{dtype}-r{rank}", ours, _masked_add(entries))


def _fold(n_out: int, n_in: int, rank: int, dtype: str) -> Count:
    """Selection and merge together, which is what one donor costs: the released way builds F once, ours twice."""
    select = _factor_threshold(n_out, n_in, rank, dtype)
    merge = _factor_sign_merge(n_out, n_in, rank, dtype)
    both = "factor_threshold and factor_sign_merge_"
    return Count(both, merge.shape, merge.case, select.ours + merge.ours, select.released + merge.released)


def _threshold(n_out: int, n_in: int) -> Count:
    entries = n_out * n_in
    found = 0.9 * entries / 128
    sample = 4 * entries * 2 ** log_stretch(entries) / BLOCK
    ours = (*[_move(sample)] * 2, _move(4 * entries + 8 * found), _move(2 * 8 * found))
    return Count("threshold", f"{n_out}x{n_in} fp32", "collect", ours, _argsort(entries))


def _sign_merge(n_out: int, n_in: int) -> Count:
    entries = n_out * n_in
    ours = (_move((2 + 2 + 4 + 2) * entries),)
    return Count("sign_merge_", f"{n_out}x{n_in} bf16, one donor", "sign_merge-bf16", ours, _masked_add(entries))


def _square(n_out: int, n_in: int) -> Count:
    """The released way: the gradient as float32, its square, the sum."""
    entries = n_out * n_in
    released = (_move((2 + 4) * entries), _move((4 + 4) * entries), _move((4 + 4 + 4) * entries))
    ours = (_move((2 + 4 + 4) * entries),)
    return Count("square_accumulate_", f"{n_out}x{n_in} bf16", "square_accumulate-bf16", ours, released)


def _wgrad(n_out: int, n_in: int) -> Count:
    """The released way: the product stored in bfloat16, then as `square_accumulate_`, and the sum of the squares."""
    entries, read = n_out * n_in, 2 * TOKENS * (n_out + n_in)
    work = {"bf16": 2.0 * TOKENS * entries}
    ours = (_move(read), Pass(read + 8 * entries, work | {"fp32": 3 * entries}))
    released = (Pass(read + 2 * entries, work), *_square(n_out, n_in).released, _move(4 * entries))
    shape = f"{n_out}x{n_in} {TOKENS} tokens bf16"
    return Count("wgrad_square_accumulate_", shape, "wgrad-bf16-frozen", ours, released)


def _prune(n_out: int, n_in: int, group: int) -> Count:
    """Half of each group stays, by the norms of the inputs. The released way's sort of a row is counted as one pass.

    It widens the weight's magnitude, multiplies, sorts, and sets a boolean mask and then the weight by places.
    """
    entries = n_out * n_in
    ours = (_move((2 + 2 + 1 / 8) * entries + 4 * n_in),)
    released = (
        _move(4 * entries),
        _move(6 * entries),
        _move(entries),
        _move((4 + 4 + 8) * entries),
        _move((8 + 1) / 2 * entries),
        _move((1 + 2 + 2) * entries),
    )
    kernel = f"prune_by_boundary-bf16-norms-{group}" if group == n_in else f"prune_by_rank-bf16-norms-{group}"
    what = "half a row" if group == n_in else f"{group // 2}:{group}"
    return Count("prune_groups_", f"{n_out}x{n_in} bf16, {what}", kernel, ours, released)


def _importance(n_out: int, n_in: int) -> Count:
    """abs(W) (norm + alpha grad). Released: abs(W), it times the norms, alpha grad, it times abs(W), the sum."""
    entries = n_out * n_in
    ours = (_move((2 + 4 + 4) * entries + 4 * n_in),)
    released = tuple(_move(n * entries) for n in (2 + 2, 2 + 4, 4 + 4, 2 + 4 + 4, 4 + 4 + 4))
    return Count("weight_importance", f"{n_out}x{n_in} bf16", "weight_importance-bf16-both", ours, released)


def _mask(n_out: int, n_in: int) -> Count:
    """The released way: bits to bytes (shifted, and one, compared), then the weight filled by them."""
    entries = n_out * n_in
    ours = (_move((2 + 2 + 1 / 8) * entries),)
    released = tuple(_move(n * entries) for n in (1 / 8 + 1, 1 + 1, 1 + 1, 1 + 2 + 2))
    return Count("apply_mask_", f"{n_out}x{n_in} bf16", "apply_mask-bf16", ours, released)


def _gram(rank: int, dtype: str) -> Count:
    """All pairs of one step. The released way builds each product and takes its norm."""
    pairs = LLAMA.layer * LLAMA.layers
    numbers = sum(rank * (n_out + n_in) for n_out, n_in in pairs)
    padded = max(16, rank)
    left = len(pairs) * split_count(len(pairs), 14336, padded) * 2 * padded * padded * 8  # matrices still to be added
    ours = (Pass(numbers * SIZE[dtype] + left, {"fp64": 2 * numbers / rank * padded * padded}), _move(left))
    released: list[Pass] = []
    for n_out, n_in in pairs:
        product = _dense_step(n_out, n_in, rank, dtype)[0]
        released += [product, _move(SIZE[dtype] * n_out * n_in)]
    shape = f"{len(pairs)} pairs of Llama-3.1-8B r={rank} {dtype}"
    return Count("gram_norm", shape, f"gram-{dtype}-{padded}", ours, tuple(released))
