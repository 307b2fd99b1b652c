"""The rows of the tables: for each op its inputs, what it must cost at the least, and what counts as right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-5
# Tensor cores truncate when they add: the 64 or 128 additions of 1,024 tokens are predicted to lower g by 2 to 4e-6 of
# itself and g^2 by twice that.
TENSOR_CORE_TOLERANCE = 5e-5
STEPS, RANKS, TOKENS, TOP = 40, (8, 64), 1024, 5  # one entry in five is kept
LARGEST_MERGE = 1 << 28  # entries times rank, on a CPU: beyond it the released way takes minutes a call
QUANTILE = 1.6423744  # of a squared standard normal: one in five lies above
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Shapes:
    """The linear weights of a model: (out, in) of the seven of a layer, and the number of layers."""

    layer: tuple[tuple[int, int], ...]
    layers: int

    @property
    def distinct(self) -> list[tuple[int, int]]:
        """Each shape once."""
        return list(dict.fromkeys(self.layer))


def _llama_like(hidden: int, narrow: int, inner: int, layers: int) -> Shapes:
    attention = ((hidden, hidden), (narrow, hidden), (narrow, hidden), (hidden, hidden))
    return Shapes((*attention, (inner, hidden), (inner, hidden), (hidden, inner)), layers)


SHAPES = {
    "llama-8b": _llama_like(4096, 1024, 14336, 32),
    "smollm2": _llama_like(576, 192, 1536, 30),
    "tiny": _llama_like(48, 16, 80, 2),
}


@dataclass(frozen=True)
class Count:
    """The least an op can do: bytes moved and arithmetic operations, and the dtype whose GEMM peak they meet."""

    bytes: int
    operations: int
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Answer:
    """What a call left behind: its result, and the tensor it wrote into (None where it writes none)."""

    returned: Any
    written: Tensor | None


Check = Callable[[tuple[Any, ...], Answer, Answer], str]


class Normal:
    """Seeded standard normals on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._source = device, torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self._source, device=self.device, dtype=dtype)


@dataclass(frozen=True)
class Case:
    """One row. make: the arguments, out of random numbers. mutated: the argument that is written, by position.

    check(arguments, expected, given): "" if right, else what is wrong with it. gpu_only: too long for a CPU.
    """

    op: str
    shape: str
    variant: str
    count: Count
    make: Callable[[Normal], tuple[Any, ...]]
    check: Check
    mutated: int | None = None
    gpu_only: bool = False


# ---- what counts as right


def _relative(given: Tensor, expected: Tensor) -> float:
    given, expected = given.double(), expected.double()
    return float((given - expected).norm() / expected.norm())


def _check_sums(arguments: tuple[Any, ...], expected: Answer, given: Answer) -> str:
    gap = float((given.returned.double() / expected.returned.double() - 1).abs().max())
    return "" if gap <= TOLERANCE else f"a norm is off by {gap:.2g}"


def product_tolerance(device: torch.device) -> float:
    """How far a sum over all tokens may be off."""
    return TENSOR_CORE_TOLERANCE if device.type == "cuda" else TOLERANCE


def _check_squares(arguments: tuple[Any, ...], expected: Answer, given: Answer, tolerance: float = TOLERANCE) -> str:
    assert given.written is not None and expected.written is not None
    gap = _relative(given.written, expected.written)
    if not gap <= tolerance:
        return f"igia is off by {gap:.2g} (relative RMS)"
    if expected.returned is None:
        return ""
    gap = abs(float(given.returned) / float(expected.returned) - 1)
    return "" if gap <= tolerance else f"the sum of squares is off by {gap:.2g}"


def _check_products(arguments: tuple[Any, ...], expected: Answer, given: Answer) -> str:
    assert given.written is not None
    return _check_squares(arguments, expected, given, product_tolerance(given.written.device))


def _near(importance: Tensor, value: Tensor) -> Tensor:
    return (importance.double() - float(value)).abs() <= TOLERANCE * float(value)


def _check_threshold(arguments: tuple[Any, ...], expected: Answer, given: Answer) -> str:
    igia, k = arguments
    value, found = expected.returned[0], given.returned
    if isinstance(found, Tensor) and found.ndim:  # a mask
        kept = found != 0
        if int(kept.sum()) != k:
            return f"the mask keeps {int(kept.sum())} entries, not {k}"
        wrong = int(((kept != (igia >= value)) & ~_near(igia, value)).sum())
        return f"{wrong} entries of the mask are wrong" if wrong else ""
    gap = abs(float(found if isinstance(found, Tensor) else found[0]) / float(value) - 1)
    if not gap <= TOLERANCE:
        return f"the threshold is off by {gap:.2g}"
    if isinstance(found, Tensor):
        return ""
    value, last = found  # of equal entries those up to this flat index are kept
    place = torch.arange(igia.numel(), device=igia.device).view(igia.shape)
    count = int(((igia > value) | ((igia == value) & (place <= last))).sum())
    return "" if count == k else f"the threshold and its last tie keep {count} entries, not {k}"


def _check_merge(
    arguments: tuple[Any, ...],
    expected: Answer,
    given: Answer,
    *,
    importance: Callable[[tuple[Any, ...], Answer, Tensor, Tensor], list[tuple[Tensor, Tensor]]],
) -> str:
    """Equal bits, but for entries whose importance lies at the threshold of some donor."""
    assert given.written is not None and expected.written is not None
    differs = given.written != expected.written
    count = int(differs.sum())
    if count > 1 + differs.numel() // 100:
        return f"{count} of {differs.numel()} merged entries differ"
    rows, columns = differs.nonzero(as_tuple=True)
    excused = torch.zeros(count, dtype=torch.bool, device=differs.device)
    for entries, value in importance(arguments, expected, rows, columns):
        excused |= _near(entries, value)
    wrong = int((~excused).sum())
    return f"{wrong} merged entries differ far from the threshold" if wrong else ""


def _dense_importance(
    arguments: tuple[Any, ...], expected: Answer, rows: Tensor, columns: Tensor
) -> list[tuple[Tensor, Tensor]]:
    return [(igia[rows, columns], value) for igia, value in zip(arguments[2], arguments[3], strict=True)]


def _factor_importance(
    arguments: tuple[Any, ...], expected: Answer, rows: Tensor, columns: Tensor
) -> list[tuple[Tensor, Tensor]]:
    _, _, a, b, _ = arguments
    gradients = (b[:, rows].double() * a[:, :, columns].mT.double()).sum(2)
    return [(gradients.square().sum(0), expected.returned)]


def _check_importance(arguments: tuple[Any, ...], expected: Answer, given: Answer) -> str:
    gap = _relative(given.returned, expected.returned)
    return "" if gap <= TOLERANCE else f"the importance is off by {gap:.2g} (relative RMS)"


def _check_pruned(arguments: tuple[Any, ...], expected: Answer, given: Answer) -> str:
    """As many in each group; which ones may differ where their importance lies at the edge of the group."""
    assert given.written is not None and expected.written is not None
    _, norms, _, _, kept, group = arguments
    ours, right = given.written.view(-1, group), expected.written.view(-1, group)
    counts = (ours != 0).sum(1)
    if not bool((counts == kept).all()):
        return f"a group keeps {int(counts[counts != kept][0])} entries, not {kept}"
    factor = norms.double().expand(expected.written.shape).reshape(-1, group)
    edge = torch.where(right != 0, right.double().abs() * factor, torch.inf).amin(1, keepdim=True)
    importance = torch.where(right != 0, right, ours).double().abs() * factor
    wrong = int(((ours != right) & ((importance - edge).abs() > TOLERANCE * edge)).sum())
    if wrong:
        return f"{wrong} pruned entries differ far from the edge"
    returned = given.returned
    if returned is None or returned.shape != expected.returned.shape or torch.equal(returned, expected.returned):
        return ""
    return "the mask is wrong"


def _check_equal(arguments: tuple[Any, ...], expected: Answer, given: Answer) -> str:
    assert given.written is not None and expected.written is not None
    count = int((given.written != expected.written).sum())
    return f"{count} entries differ" if count else ""


# ---- the rows, op by op; each docstring is the count that its table prints


def gram_norm(shapes: Shapes) -> Iterator[Case]:
    """bytes: the factors, 4 r (in + out) a pair; operations: r (r + 1) (in + out) a pair, in float64."""
    pairs = shapes.layer * shapes.layers
    length = sum(i + o for o, i in pairs)
    for r in RANKS:

        def make(normal: Normal, r: int = r) -> tuple[Any, ...]:
            return [normal(r, i) for _, i in pairs], [normal(o, r) for o, _ in pairs]

        count = Count(4 * r * length, r * (r + 1) * length, torch.float64)
        yield Case("gram_norm", f"{len(pairs)} pairs", f"r={r}", count, make, _check_sums)


def factor_merge(shapes: Shapes) -> Iterator[Case]:
    """bytes: the factors, 4 t r (in + out), and 6 an entry; operations: F twice, 4 t (r + 1) an entry."""
    for (o, i), r in product(shapes.distinct, RANKS):

        def make(normal: Normal, o: int = o, i: int = i, r: int = r) -> tuple[Any, ...]:
            weight, donor = normal(o, i, dtype=torch.bfloat16), normal(o, i, dtype=torch.bfloat16)
            return weight, donor, normal(STEPS, r, i), normal(STEPS, o, r), o * i // TOP

        count = Count(4 * STEPS * r * (i + o) + 6 * o * i, 4 * STEPS * (r + 1) * o * i)
        check, large = partial(_check_merge, importance=_factor_importance), r * o * i > LARGEST_MERGE
        yield Case("factor_merge", f"{o}x{i}", f"r={r}, t={STEPS}", count, make, check, mutated=0, gpu_only=large)


def threshold(shapes: Shapes) -> Iterator[Case]:
    """bytes: one read, 4 an entry; operations: one comparison an entry."""
    for o, i in shapes.distinct:

        def make(normal: Normal, o: int = o, i: int = i) -> tuple[Any, ...]:
            return normal(o, i).square_(), o * i // TOP

        yield Case("threshold", f"{o}x{i}", "top 20 %", Count(4 * o * i, o * i), make, _check_threshold)


def sign_merge_(shapes: Shapes) -> Iterator[Case]:
    """bytes: 4 + 6 n an entry for n donors (bf16 weights, fp32 importance); operations: 3 n an entry."""
    for (o, i), n in product(shapes.distinct, (1, 3)):

        def make(normal: Normal, o: int = o, i: int = i, n: int = n) -> tuple[Any, ...]:
            weight, *donors = (normal(o, i, dtype=torch.bfloat16) for _ in range(n + 1))
            edge = torch.tensor(QUANTILE, device=normal.device), torch.tensor(-1, device=normal.device)
            return weight, donors, [normal(o, i).square_() for _ in donors], [edge[0]] * n, [edge[1]] * n, [1.0] * n

        count = Count((4 + 6 * n) * o * i, 3 * n * o * i)
        check = partial(_check_merge, importance=_dense_importance)
        yield Case("sign_merge_", f"{o}x{i}", f"n={n}", count, make, check, mutated=0)


def square_accumulate_(shapes: Shapes) -> Iterator[Case]:
    """bytes: 12 an entry of an fp32 gradient, 10 of a bf16 one; operations: 2 an entry."""
    for (o, i), name in product(shapes.distinct, DTYPES):

        def make(normal: Normal, o: int = o, i: int = i, dtype: torch.dtype = DTYPES[name]) -> tuple[Any, ...]:
            return normal(o, i).square_(), normal(o, i, dtype=dtype)

        count = Count((8 + DTYPES[name].itemsize) * o * i, 2 * o * i)
        yield Case("square_accumulate_", f"{o}x{i}", name, count, make, _check_squares, mutated=0)


def outer_square_accumulate_(shapes: Shapes) -> Iterator[Case]:
    """bytes: 8 an entry and the factors, 4 r (in + out); operations: 2 (r + 1) an entry."""
    for (o, i), r in product(shapes.distinct, RANKS):

        def make(normal: Normal, o: int = o, i: int = i, r: int = r) -> tuple[Any, ...]:
            return normal(o, i).square_(), normal(r, i), normal(o, r)

        count = Count(8 * o * i + 4 * r * (i + o), 2 * (r + 1) * o * i)
        yield Case("outer_square_accumulate_", f"{o}x{i}", f"r={r}", count, make, _check_squares, mutated=0)


def wgrad_square_accumulate_(shapes: Shapes) -> Iterator[Case]:
    """bytes: 8 an entry, and x and dy once; operations: 2 T an entry, against the GEMM peak of the dtype of x."""
    for (o, i), name in product(shapes.distinct, DTYPES):
        dtype, t = DTYPES[name], TOKENS

        def make(normal: Normal, o: int = o, i: int = i, dtype: torch.dtype = dtype) -> tuple[Any, ...]:
            return normal(o, i).square_(), normal(TOKENS, i, dtype=dtype), normal(TOKENS, o, dtype=dtype), None

        count = Count(8 * o * i + dtype.itemsize * t * (i + o), 2 * t * o * i, dtype)
        yield Case("wgrad_square_accumulate_", f"{o}x{i}", f"{name}, T={t}", count, make, _check_products, mutated=0)


def weight_importance(shapes: Shapes) -> Iterator[Case]:
    """bytes: 6 an entry of a bf16 weight, and 4 of its gradients; operations: 2 an entry, or 4."""
    for (o, i), by in product(shapes.distinct, ("norms", "norms, grads")):

        def make(normal: Normal, o: int = o, i: int = i, grads: bool = by != "norms") -> tuple[Any, ...]:
            weight = normal(o, i, dtype=torch.bfloat16)
            return weight, normal(i).abs_(), normal(o, i).abs_() if grads else None, 100.0

        count = Count(6 * o * i, 2 * o * i) if by == "norms" else Count(10 * o * i, 4 * o * i)
        yield Case("weight_importance", f"{o}x{i}", by, count, make, _check_importance)


def prune_groups_(shapes: Shapes) -> Iterator[Case]:
    """bytes: 4 an entry (a bf16 weight, by norms) and a bit of the mask; operations: 2 an entry and a comparison."""
    for (o, i), (kept, group) in product(shapes.distinct, ((0, 0), (2, 4), (4, 8))):
        if group and i % group:
            continue

        def make(normal: Normal, o: int = o, i: int = i, kept: int = kept, group: int = group) -> tuple[Any, ...]:
            weight = normal(o, i, dtype=torch.bfloat16)
            return weight, normal(i).abs_(), None, 1.0, kept or i // 2, group or i

        named = f"{kept}:{group}" if group else "half a row"
        count = Count(4 * o * i + o * -(-i // 8), 3 * o * i)
        yield Case("prune_groups_", f"{o}x{i}", named, count, make, _check_pruned, mutated=0)


def apply_mask_(shapes: Shapes) -> Iterator[Case]:
    """bytes: 4 an entry of a bf16 weight and a bit of the mask; operations: one an entry."""
    for o, i in shapes.distinct:

        def make(normal: Normal, o: int = o, i: int = i) -> tuple[Any, ...]:
            mask = normal(o, -(-i // 8)).mul_(64).to(torch.int32) & 255
            return normal(o, i, dtype=torch.bfloat16), mask.to(torch.uint8)

        count = Count(4 * o * i + o * -(-i // 8), o * i)
        yield Case("apply_mask_", f"{o}x{i}", "bf16", count, make, _check_equal, mutated=0)


def wgrad_abs_accumulate_(shapes: Shapes) -> Iterator[Case]:
    """bytes: 8 an entry, and x and dy once; operations: 2 T an entry, against the GEMM peak of the dtype of x."""
    for (o, i), name in product(shapes.distinct, DTYPES):
        dtype, t = DTYPES[name], TOKENS

        def make(normal: Normal, o: int = o, i: int = i, dtype: torch.dtype = dtype) -> tuple[Any, ...]:
            return normal(o, i).abs_(), normal(TOKENS, i, dtype=dtype), normal(TOKENS, o, dtype=dtype)

        count = Count(8 * o * i + dtype.itemsize * t * (i + o), 2 * t * o * i, dtype)
        yield Case("wgrad_abs_accumulate_", f"{o}x{i}", f"{name}, T={t}", count, make, _check_products, mutated=0)


OPERATIONS: dict[str, Callable[[Shapes], Iterator[Case]]] = {
    function.__name__: function
    for function in (
        gram_norm,
        factor_merge,
        threshold,
        sign_merge_,
        square_accumulate_,
        outer_square_accumulate_,
        wgrad_square_accumulate_,
        weight_importance,
        prune_groups_,
        apply_mask_,
        wgrad_abs_accumulate_,
    )
}


def cases(op: str, shapes: Shapes, device: torch.device) -> list[Case]:
    """The rows of one op's table on this device."""
    return [case for case in OPERATIONS[op](shapes) if device.type == "cuda" or not case.gpu_only]
