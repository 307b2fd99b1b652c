"""The ops that prune single weights, on every backend, against one entry at a time by sorting: equal to the bit."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
import torch
from on_device import placed

from gradpruner import ops
from gradpruner.errors import InvalidArgument

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
JUDGED = ["magnitude", "norms", "grads", "both"]
pytestmark = pytest.mark.usefixtures("backend")


def normal(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def whole(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    """Small integers: ties everywhere, and sums of products that are exact."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def special(*shape: int, dtype=torch.float32) -> torch.Tensor:
    """Normal entries with every fifth one out of the ordinary."""
    weight = normal(*shape).to(dtype)
    values = torch.tensor([NAN, 0.0, INF, -0.0, -INF, 6e-8, -NAN], dtype=dtype)
    flat = weight.view(-1)
    flat[::5] = values.repeat(len(flat[::5]) // len(values) + 1)[: len(flat[::5])]
    return weight


def judges(kind: str, shape: tuple[int, int]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """norms and grads, some below zero and some NaN."""
    norms, grads = normal(shape[1], seed=5) + 0.5, normal(*shape, seed=6)
    norms[2::7], grads.view(-1)[3::11] = NAN, NAN
    return norms if kind in ("norms", "both") else None, grads if kind in ("grads", "both") else None


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.dtype == y.dtype and torch.equal(x.contiguous().view(bits), y.contiguous().view(bits))


def importance(weight, norms, grads, alpha: float) -> np.ndarray:
    """By numpy, whose float32 operations round one by one."""
    found = np.abs(weight.float().numpy())
    with np.errstate(all="ignore"):
        if grads is not None:
            scaled = np.float32(alpha) * grads.numpy()
            found = found * (scaled if norms is None else norms.numpy() + scaled)
        elif norms is not None:
            found = found * norms.numpy()
        return np.where(found > 0, found, np.float32(0))


def kept_entries(found: np.ndarray, kept: int, group: int) -> torch.Tensor:
    """By sorting each group: the most important first, of equals the one before."""
    keep = torch.zeros(found.shape, dtype=torch.bool)
    for row, start in itertools.product(range(found.shape[0]), range(0, found.shape[1], group)):
        values = found[row, start : start + group].tolist()
        keep[row, start + torch.tensor(sorted(range(group), key=lambda j: (-values[j], j))[:kept], dtype=int)] = True
    return keep


def packed(keep: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.packbits(keep.numpy(), axis=1, bitorder="little"))


def check_pruned(weight, norms, grads, alpha: float, kept: int, group: int) -> None:
    keep = kept_entries(importance(weight, norms, grads, alpha), kept, group)
    expected = torch.where(keep, weight, torch.zeros((), dtype=weight.dtype))
    mask = ops.prune_groups_(weight, norms, grads, alpha, kept, group)
    assert mask.dtype == torch.uint8 and torch.equal(mask, packed(keep))
    assert same_bits(weight, expected)


# ---- weight_importance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("judged", JUDGED)
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (3, 1100)])
def test_importance(dtype, judged, shape):
    weight = special(*shape, dtype=dtype)
    norms, grads = judges(judged, shape)
    for alpha in (100.0, 0.1):
        found = ops.weight_importance(weight, norms, grads, alpha)
        assert same_bits(found, torch.from_numpy(importance(weight, norms, grads, alpha)))


def test_importance_rounds_every_operation():
    # fused, norms + alpha * grads would keep the bits that this loses
    norms, grads = torch.full((64,), -1.0), torch.full((1, 64), 1 + 2.0**-12)
    found = ops.weight_importance(torch.ones(1, 64), norms, grads, 1 + 2.0**-12)
    assert torch.equal(found, torch.full((1, 64), 2.0**-11))


def test_importance_of_views_and_of_nothing():
    weight, norms, grads = normal(12, 9).T[:, ::2], normal(12, seed=1)[::2], normal(6, 9, seed=2).T
    expected = importance(weight, norms.contiguous(), grads.contiguous(), 3.0)
    assert same_bits(ops.weight_importance(weight, norms, grads, 3.0), torch.from_numpy(expected))
    for shape in ((0, 4), (4, 0)):
        assert ops.weight_importance(torch.zeros(shape), None, None, 1.0).shape == shape


# ---- prune_groups_


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("judged", JUDGED)
@pytest.mark.parametrize("group", [4, 8, 24, 48, 96])
def test_pruned_by_any_judge(dtype, judged, group):
    shape = (5, 96)
    check_pruned(special(*shape, dtype=dtype), *judges(judged, shape), 100.0, group // 2, group)


# small and large, powers of two and not, ends inside a byte and with it, several vectors and several blocks
SMALL = [(1, 1), (9, 1), (7, 2), (300, 4), (250, 5), (5, 8), (3, 16), (3, 31), (40, 32), (1, 7), (1, 29)]
LARGE = [(1, 33), (3, 35), (3, 36), (2, 64), (1, 65), (2, 127), (3, 128), (1, 1003), (2, 1200), (1, 5000)]


@pytest.mark.parametrize(("groups", "group"), [*SMALL, *LARGE])
@pytest.mark.parametrize("make", [normal, whole, special])
def test_pruned_groups_of_any_size(make, groups, group):
    for kept in {0, 1, group // 2, group - 1, group}:
        check_pruned(make(2, groups * group), None, None, 1.0, kept, group)


def test_a_row_longer_than_the_registers_hold():
    check_pruned(normal(2, 16400, dtype=torch.bfloat16), *judges("norms", (2, 16400)), 1.0, 8200, 16400)
    check_pruned(whole(1, 16391), None, None, 1.0, 5000, 16391)


def test_of_equals_the_first_are_kept():
    weight = torch.tensor([[2.0, 1.0, -2.0, 1.0, 1.0, 3.0, -1.0, 0.0]])
    for kept, group in itertools.chain(
        ((k, 8) for k in range(9)), ((k, 4) for k in range(5)), ((k, 2) for k in (0, 1))
    ):
        check_pruned(weight.clone(), None, None, 1.0, kept, group)
    check_pruned(torch.full((2, 300), 7.0), None, None, 1.0, 101, 300)
    check_pruned(torch.zeros(2, 300), None, None, 1.0, 101, 300)
    check_pruned(torch.full((2, 300), NAN), None, None, 1.0, 101, 150)


@pytest.mark.parametrize("exponent", [-149, -140, -126, 0, 100, 127])
@pytest.mark.parametrize("group", [20, 100])
def test_importance_over_the_whole_range_of_float32(exponent, group):
    weight = (torch.arange(100, 0, -1, dtype=torch.float64) * 2.0**exponent).float()[None].flip(1)
    check_pruned(weight, None, None, 1.0, group // 3, group)


def test_rows_that_differ_by_orders_of_magnitude():
    weight = normal(10, 700) * 10.0 ** (torch.arange(10) % 7 * 9 - 30)[:, None]
    check_pruned(weight, None, None, 1.0, 300, 700)


@pytest.mark.slow
@pytest.mark.in_ci
def test_many_rows():
    rows = 20 if INTERPRETING else 2000  # enough for several threads
    check_pruned(normal(rows, 100, dtype=torch.bfloat16), *judges("norms", (rows, 100)), 1.0, 50, 100)
    weight, (norms, grads) = normal(rows, 120), judges("both", (rows, 120))
    found = importance(weight, norms, grads, 0.5)
    assert same_bits(ops.weight_importance(weight, norms, grads, 0.5), torch.from_numpy(found))
    keep, before, again = kept_entries(found, 2, 4), weight.clone(), weight.clone()
    mask = ops.prune_groups_(weight, norms, grads, 0.5, 2, 4)
    ops.apply_mask_(again, mask)
    assert torch.equal(mask, packed(keep)) and torch.equal(weight, torch.where(keep, before, 0.0))
    assert torch.equal(again, weight)


def test_pruning_of_views_and_of_nothing():
    store = normal(24, 10)
    weight, before = store.T[:, ::2], store.clone()
    keep = kept_entries(importance(weight, None, None, 1.0), 2, 4)
    mask = ops.prune_groups_(weight, None, None, 1.0, 2, 4)
    assert torch.equal(mask, packed(keep))
    assert torch.equal(store[::2], torch.where(keep.T, before[::2], 0.0)) and torch.equal(store[1::2], before[1::2])
    assert ops.prune_groups_(torch.zeros(0, 12), None, None, 1.0, 2, 4).shape == (0, 2)
    assert ops.prune_groups_(torch.zeros(3, 0), None, None, 1.0, 1, 1).shape == (3, 0)


# ---- apply_mask_


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 8), (4, 75), (2, 1100)])
def test_apply_mask(dtype, shape):
    weight = special(*shape, dtype=dtype)
    mask = torch.randint(0, 256, (shape[0], -(-shape[1] // 8)), generator=torch.Generator().manual_seed(3))
    mask = mask.to(torch.uint8)  # bits past the last column too
    keep = torch.from_numpy(np.unpackbits(mask.numpy(), axis=1, bitorder="little")[:, : shape[1]]).bool()
    expected = torch.where(keep, weight, torch.zeros((), dtype=dtype))
    ops.apply_mask_(weight, mask)
    assert same_bits(weight, expected)


def test_a_mask_prunes_as_the_op_that_made_it_did():
    weight = normal(6, 45)
    again, view = weight.clone(), weight.T.clone().T
    mask = ops.prune_groups_(weight, None, None, 1.0, 4, 9)
    ops.apply_mask_(again, mask)
    ops.apply_mask_(view, mask.T.clone().T)
    assert torch.equal(again, weight) and torch.equal(view, weight)
    for shape in ((0, 4), (4, 0)):
        ops.apply_mask_(torch.zeros(shape), torch.zeros(shape[0], -(-shape[1] // 8), dtype=torch.uint8))


# ---- wgrad_abs_accumulate_


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "out", "inp"), [(1, 1, 1), (5, 7, 3), (70, 33, 65), (70, 290, 150)])
def test_absolute_weight_gradient(dtype, tokens, out, inp):
    x, dy = normal(tokens, inp, dtype=dtype), normal(tokens, out, dtype=dtype, seed=1)
    total = normal(out, inp, seed=2)
    expected = total.double() + (dy.double().T @ x.double()).abs()
    ops.wgrad_abs_accumulate_(total, x, dy)
    assert (total.double() - expected).square().mean() < (1e-6**2) * expected.square().mean()
    x, dy, total = whole(tokens, inp, dtype=dtype), whole(tokens, out, dtype=dtype, seed=1), whole(out, inp, seed=2)
    expected = total + (dy.double().T @ x.double()).abs().float()
    ops.wgrad_abs_accumulate_(total, x, dy)
    assert torch.equal(total, expected)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["x", "dy"])
def test_a_bad_value_leaves_the_total_alone(bad, where):
    x, dy, total = normal(20, 9), normal(20, 6), torch.ones(6, 9)
    (x if where == "x" else dy)[3, 2] = bad
    ops.wgrad_abs_accumulate_(total, x, dy)
    assert torch.equal(total, torch.ones(6, 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_overflows_float32_adds_nothing(dtype):
    x, dy = torch.full((1, 2), 1e20, dtype=dtype), torch.tensor([[-1e20, -2.0]], dtype=dtype)
    total = torch.ones(2, 2)
    ops.wgrad_abs_accumulate_(total, x, dy)
    assert torch.equal(total, torch.tensor([[1.0, 1.0], [2e20, 2e20]]))


def test_absolute_gradient_of_no_tokens_and_no_entries_and_views():
    total = torch.ones(3, 4)
    ops.wgrad_abs_accumulate_(total, torch.zeros(0, 4), torch.zeros(0, 3))
    assert torch.equal(total, torch.ones(3, 4))
    ops.wgrad_abs_accumulate_(torch.zeros(3, 0), torch.zeros(5, 0), torch.zeros(5, 3))
    x, dy, total = whole(4, 9).T, whole(6, 9, seed=1).T[:, ::2], torch.zeros(4, 3).T
    ops.wgrad_abs_accumulate_(total, x, dy)
    assert torch.equal(total.double(), (dy.double().T @ x.double()).abs())


# ---- the contract itself


def op_calls():
    op, norms, grads = torch.ops.gradpruner, normal(12).abs(), normal(4, 12, seed=1)
    mask = torch.randint(0, 16, (4, 2), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return {
        "weight_importance": (op.weight_importance, (normal(4, 12), norms, grads, 100.0)),
        "prune_groups_ rows": (op.prune_groups_, (normal(4, 12), norms, None, 1.0, 5, 12)),
        "prune_groups_ 2:4": (op.prune_groups_, (normal(4, 12), None, grads, 0.5, 2, 4)),
        "apply_mask_": (op.apply_mask_, (normal(4, 12), mask)),
        "wgrad_abs_accumulate_": (op.wgrad_abs_accumulate_, (normal(4, 5), normal(7, 5), normal(7, 4))),
    }


@pytest.mark.parametrize("name", op_calls())
def test_opcheck(name):
    op, args = op_calls()[name]
    assert set(torch.library.opcheck(op, placed(args)).values()) == {"SUCCESS"}


def test_usable_under_compile():
    op = torch.ops.gradpruner

    def prune_twice(weight, total, x, dy):
        op.wgrad_abs_accumulate_(total, x, dy)
        mask = op.prune_groups_(weight, None, total, 1.0, 2, 4)
        op.apply_mask_(total, mask)
        return op.weight_importance(weight, None, total, 2.0)

    results = []
    for call in (prune_twice, torch.compile(prune_twice, fullgraph=True, backend="aot_eager")):
        weight, total, x, dy = placed((normal(4, 8), torch.zeros(4, 8), whole(6, 8), whole(6, 4, seed=1)))
        results.append((call(weight, total, x, dy), weight, total))
    for plain, compiled in zip(*results, strict=True):
        assert torch.equal(plain, compiled)


def prune(weight, norms=None, grads=None, kept=1, group=4):
    return lambda: ops.prune_groups_(weight, norms, grads, 1.0, kept, group)


BAD_CALLS = {
    "integers": prune(torch.ones(2, 4, dtype=torch.int32)),
    "a vector": prune(torch.ones(4)),
    "norms of the rows": prune(torch.ones(2, 4), norms=torch.ones(2)),
    "norms in half": prune(torch.ones(2, 4), norms=torch.ones(4).half()),
    "grads of another shape": prune(torch.ones(2, 4), grads=torch.ones(4, 2)),
    "a group that does not divide": prune(torch.ones(2, 6)),
    "a group of none": prune(torch.ones(2, 4), group=0),
    "a group beyond the row": prune(torch.ones(2, 4), group=8),
    "more than the group": prune(torch.ones(2, 4), kept=5),
    "less than none": prune(torch.ones(2, 4), kept=-1),
    "importance of integers": lambda: ops.weight_importance(torch.ones(2, 4, dtype=torch.int64), None, None, 1.0),
    "a mask of booleans": lambda: ops.apply_mask_(torch.ones(2, 8), torch.ones(2, 1, dtype=torch.bool)),
    "a mask too wide": lambda: ops.apply_mask_(torch.ones(2, 8), torch.ones(2, 2, dtype=torch.uint8)),
    "tokens that differ": lambda: ops.wgrad_abs_accumulate_(torch.ones(2, 3), normal(4, 3), normal(5, 2)),
    "dtypes that differ": lambda: ops.wgrad_abs_accumulate_(torch.ones(2, 3), normal(4, 3), normal(4, 2).half()),
    "a total in half": lambda: ops.wgrad_abs_accumulate_(torch.ones(2, 3).half(), normal(4, 3), normal(4, 2)),
    "a total of another shape": lambda: ops.wgrad_abs_accumulate_(torch.ones(3, 2), normal(4, 3), normal(4, 2)),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused(name):
    with pytest.raises(InvalidArgument, match=r"expected|accepted"):
        BAD_CALLS[name]()
