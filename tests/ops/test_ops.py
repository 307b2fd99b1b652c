"""Every op on every backend against the plain float64 oracle: dtypes, odd shapes, empties, views, NaN and Inf."""

from __future__ import annotations

import math
import os

import oracle
import pytest
import torch
from on_device import DEVICE, placed

from gradpruner import ops
from gradpruner.errors import InvalidArgument

INF, NAN = float("inf"), float("nan")
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
WEIGHT_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FACTOR_DTYPES = [torch.float32, torch.bfloat16]
# (out, in), t, r: single entries, primes, powers of two, tall and wide
SHAPES = [((1, 1), 1, 1), ((7, 13), 3, 2), ((64, 48), 4, 8), ((33, 130), 2, 5), ((129, 3), 2, 17)]
pytestmark = pytest.mark.usefixtures("backend")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float32).to(dtype)


def whole(*shape: int, dtype=torch.float32, seed: int = 0, low: int = -2, high: int = 3) -> torch.Tensor:
    """Small integers: every product and sum below is exact in float32."""
    return torch.randint(low, high, shape, generator=rng(seed)).to(dtype)


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return torch.equal(x.contiguous().view(bits), y.contiguous().view(bits))


def relative_rms(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x.double() - y.double()).square().mean().sqrt() / y.double().square().mean().sqrt())


def mask_from(f: torch.Tensor, value: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    j = torch.arange(f.numel()).view(f.shape)
    return (f > 0) & ((f > value) | ((f == value) & (j <= index)))


# ---- gram_norm


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_gram_norm_of_a_whole_step(dtype):
    sizes = [(5, 3, 1), (64, 48, 8), (1, 1, 1), (130, 33, 16), (17, 200, 5), (8, 8, 64), (9, 70, 0)]
    a = [normal(r, i, dtype=dtype, seed=n) for n, (_, i, r) in enumerate(sizes)]
    b = [normal(o, r, dtype=dtype, seed=n + 50) for n, (o, _, r) in enumerate(sizes)]
    expected = torch.stack([(y.double() @ x.double()).square().sum() for x, y in zip(a, b, strict=True)])
    got = ops.gram_norm(a, b)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)


def test_gram_norm_keeps_accuracy_where_rows_cancel():
    # gB gA is tiny against |gB| |gA|: float32 Gram matrices lose this (docs/method.md, section 1: 3 % and more)
    basis = torch.linalg.qr(normal(256, 16, seed=1).double())[0].float()
    a = [basis.T[:8].contiguous()]
    b = [(normal(64, 8, seed=2) * torch.tensor([1.0, 1e-4] * 4)).contiguous()]
    expected = (b[0].double() @ a[0].double()).square().sum()
    assert float(ops.gram_norm(a, b)[0]) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_gram_norm_of_a_bad_pair_leaves_the_others_alone(bad):
    a, b = [normal(2, 9), normal(2, 9)], [normal(5, 2), normal(5, 2)]
    a[1][1, 3] = bad
    got = ops.gram_norm(a, b)
    assert math.isfinite(got[0]) and not math.isfinite(got[1])


def test_gram_norm_of_views_and_of_nothing():
    a, b = normal(9, 6).T[::2], normal(3, 7).T
    expected = (b.double() @ a.double()).square().sum()
    torch.testing.assert_close(ops.gram_norm([a], [b])[0], expected, rtol=1e-12, atol=0)
    assert ops.gram_norm([], []).shape == (0,)
    assert float(ops.gram_norm([torch.zeros(2, 0)], [torch.zeros(0, 2)])[0]) == 0.0


# ---- square_accumulate_, outer_square_accumulate_


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7, 13), (0, 4), (257, 65), (3, 5, 7)])
def test_square_accumulate(dtype, shape):
    igia, grad = normal(*shape, seed=1).abs(), normal(*shape, dtype=dtype)
    expected = igia + grad.float().square()
    ops.square_accumulate_(igia, grad)
    torch.testing.assert_close(igia, expected, rtol=2e-7, atol=0)


def test_square_accumulate_into_and_from_views():
    store = torch.zeros(6, 10)
    grad = normal(10, 6, dtype=torch.bfloat16).T
    ops.square_accumulate_(store[:, ::2], grad[:, ::2])
    torch.testing.assert_close(store[:, ::2], grad[:, ::2].float().square())
    assert not store[:, 1::2].any()


@pytest.mark.parametrize("dtype", FACTOR_DTYPES)
@pytest.mark.parametrize(("shape", "t", "r"), SHAPES)
def test_outer_square_accumulate(dtype, shape, t, r):
    a, b = normal(r, shape[1], dtype=dtype), normal(shape[0], r, dtype=dtype, seed=1)
    igia = normal(*shape, seed=2).abs()
    expected = igia.double() + (b.double() @ a.double()).square()
    ops.outer_square_accumulate_(igia, a, b)
    assert relative_rms(igia, expected) < 1e-6


def test_outer_square_accumulate_of_rank_zero_and_no_entries():
    igia = torch.ones(3, 4)
    ops.outer_square_accumulate_(igia, torch.zeros(0, 4), torch.zeros(3, 0))
    assert torch.equal(igia, torch.ones(3, 4))
    ops.outer_square_accumulate_(torch.zeros(0, 4), torch.zeros(2, 4), torch.zeros(0, 2))


# ---- wgrad_square_accumulate_


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize(("tokens", "out", "inp"), [(1, 1, 1), (5, 7, 3), (70, 33, 65), (128, 64, 48)])
@pytest.mark.parametrize("keep", [True, False])
def test_frozen_weight_gradient_is_squared_and_summed(dtype, tokens, out, inp, keep):
    x, dy = normal(tokens, inp, dtype=dtype), normal(tokens, out, dtype=dtype, seed=1)
    g = dy.double().T @ x.double()
    igia = normal(out, inp, seed=2).abs() if keep else None
    expected = None if igia is None else igia.double() + g.square()
    total = ops.wgrad_square_accumulate_(igia, x, dy, None)
    assert total.dtype == torch.float64 and total.shape == ()
    assert float(total) == pytest.approx(float(g.square().sum()), rel=1e-5)
    if igia is not None:
        assert relative_rms(igia, expected) < 2e-6


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trainable_weight_gradient_is_stored_and_squared_as_stored(dtype, grad_dtype):
    # integers: the sum over tokens and the sum with grad are exact, so the stored gradient is too
    x, dy = whole(37, 19, dtype=dtype), whole(37, 11, dtype=dtype, seed=1)
    grad = whole(11, 19, dtype=grad_dtype, seed=2)
    stored = (grad.double() + dy.double().T @ x.double()).to(grad_dtype)
    igia = torch.zeros(11, 19)
    total = ops.wgrad_square_accumulate_(igia, x, dy, grad)
    assert torch.equal(grad, stored)
    assert torch.equal(igia, stored.float().square())
    assert float(total) == float(stored.double().square().sum())


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["x", "dy"])
def test_wgrad_with_a_bad_value_leaves_igia_alone_and_says_so(bad, where):
    x, dy = normal(20, 9), normal(20, 6)
    (x if where == "x" else dy)[3, 2] = bad
    igia = torch.ones(6, 9)
    total = ops.wgrad_square_accumulate_(igia, x, dy, None)
    assert not math.isfinite(total)
    assert torch.equal(igia, torch.ones(6, 9))


@pytest.mark.parametrize("where", ["x", "dy"])
@pytest.mark.parametrize("token", [0, 2999])
def test_wgrad_with_a_bad_value_anywhere_in_a_long_batch(token, where):
    """Long enough that several programs of a kernel look for it."""
    x, dy = normal(3000, 9, dtype=torch.bfloat16), normal(3000, 6, dtype=torch.bfloat16)
    (x if where == "x" else dy)[token, 5] = NAN
    igia = torch.ones(6, 9)
    assert not math.isfinite(ops.wgrad_square_accumulate_(igia, x, dy, None))
    assert torch.equal(igia, torch.ones(6, 9))


def test_wgrad_square_that_overflows_float32():
    x, dy = torch.full((1, 2), 1e15), torch.tensor([[1e15, 1.0]])
    igia = torch.ones(2, 2)
    total = ops.wgrad_square_accumulate_(igia, x, dy, None)
    assert torch.equal(igia[0], torch.ones(2))
    torch.testing.assert_close(igia[1], torch.full((2,), 1e30))
    assert float(total) == pytest.approx(2e60, rel=1e-6)


def test_wgrad_of_no_tokens_and_no_entries_and_views():
    igia = torch.ones(3, 4)
    assert float(ops.wgrad_square_accumulate_(igia, torch.zeros(0, 4), torch.zeros(0, 3), None)) == 0.0
    assert torch.equal(igia, torch.ones(3, 4))
    assert float(ops.wgrad_square_accumulate_(None, torch.zeros(5, 0), torch.zeros(5, 3), None)) == 0.0
    x, dy, igia = whole(4, 9).T, whole(6, 9, seed=1).T[:, ::2], torch.zeros(4, 3).T
    total = ops.wgrad_square_accumulate_(igia, x, dy, None)
    g = dy.double().T @ x.double()
    assert torch.equal(igia.double(), g.square()) and float(total) == float(g.square().sum())


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_wgrad_of_several_tiles(dtype):
    x, dy = whole(70, 150, dtype=dtype), whole(70, 290, dtype=dtype, seed=1)
    igia = whole(290, 150, low=0, high=9, seed=2)
    expected = igia + (dy.double().T @ x.double()).square().float()
    total = ops.wgrad_square_accumulate_(igia, x, dy, None)
    assert torch.equal(igia, expected) and float(total) == float((dy.double().T @ x.double()).square().sum())


# ---- threshold


def check_threshold(f: torch.Tensor, k: int) -> None:
    value, index = ops.threshold(f, k)
    assert value.dtype == torch.float32 and index.dtype == torch.int64
    assert torch.equal(mask_from(f, value, index), oracle.mask_of(f, k))


@pytest.mark.parametrize("shape", [(1,), (7, 13), (130, 33), (3, 5, 7)])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.57, 1.0])
def test_threshold_keeps_exactly_the_k_largest(shape, share):
    f = normal(*shape).square()
    check_threshold(f, int(share * f.numel()))


def test_threshold_ties_go_to_the_lower_index():
    f = torch.tensor([[2.0, 1.0, 2.0, 1.0], [1.0, 3.0, 1.0, 0.0]])
    for k in range(9):
        check_threshold(f, k)
    check_threshold(whole(40, 41, low=0, high=4), 500)
    check_threshold(torch.full((33, 65), 7.0), 1000)


@pytest.mark.parametrize("exponent", [-149, -140, -126, -30, 0, 100, 127])
def test_threshold_over_the_whole_range_of_float32(exponent):
    f = (torch.arange(1, 101, dtype=torch.float64) * 2.0**exponent).float()
    check_threshold(f.flip(0), 37)


def test_threshold_of_special_values():
    f = torch.tensor([NAN, 1.0, INF, 0.0, -0.0, -1.0, 5.0, 1e-45, INF, -INF])
    for k in range(11):
        check_threshold(f, k)
    value, index = ops.threshold(torch.zeros(3, 3), 4)
    assert float(value) == INF and int(index) == -1


def test_threshold_of_a_view_uses_the_order_of_the_view():
    check_threshold(whole(12, 9, low=0, high=3).T, 30)
    check_threshold(normal(20, 30).square()[:, ::3], 17)


# ---- factor_threshold


@pytest.mark.parametrize("dtype", FACTOR_DTYPES)
@pytest.mark.parametrize(("shape", "t", "r"), SHAPES)
def test_factor_threshold_is_exact_where_f_is(dtype, shape, t, r):
    a, b = whole(t, r, shape[1], dtype=dtype), whole(t, shape[0], r, dtype=dtype, seed=1)
    f = oracle.importance(a, b)
    for k in {0, 1, f.numel() // 5, f.numel() // 2, f.numel()}:
        value, index = ops.factor_threshold(a, b, k)
        assert torch.equal(mask_from(f.float(), value, index), oracle.mask_of(f, k))


def test_factor_threshold_of_no_steps_and_no_rank():
    for a, b in [(torch.zeros(0, 2, 5), torch.zeros(0, 4, 2)), (torch.zeros(3, 0, 5), torch.zeros(3, 4, 0))]:
        value, index = ops.factor_threshold(a, b, 3)
        assert float(value) == INF and int(index) == -1


# ---- sign_merge_, factor_sign_merge_


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("count", [1, 3])
def test_sign_merge_is_bit_exact(dtype, count):
    weight = normal(37, 21, dtype=dtype)
    donors = [normal(37, 21, dtype=dtype, seed=9 + n) for n in range(count)]
    for tensor in (weight, donors[0]):
        tensor[0, :6] = torch.tensor([0.0, -0.0, INF, -INF, NAN, 65504.0], dtype=dtype)
    weight[1, :4] = torch.tensor([0.0, -0.0, NAN, 1.0], dtype=dtype)
    igias = [whole(37, 21, seed=20 + n, low=0, high=9) for n in range(count)]
    edges = [ops.threshold(f, 150) for f in igias]
    expected = oracle.merge(weight, donors, [oracle.mask_of(f, 150) for f in igias])
    ops.sign_merge_(weight, donors, igias, [v for v, _ in edges], [i for _, i in edges], [1.0] * count)
    assert same_bits(weight, expected)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES[:3])
@pytest.mark.parametrize("factor_dtype", FACTOR_DTYPES)
@pytest.mark.parametrize(("shape", "t", "r"), SHAPES)
def test_factor_sign_merge_is_bit_exact_where_f_is(dtype, factor_dtype, shape, t, r):
    weight = normal(*shape, dtype=dtype)
    donors = [normal(*shape, dtype=dtype, seed=s) for s in (5, 6, 7)]
    a = [whole(t, r, shape[1], dtype=factor_dtype, seed=s) for s in (15, 16, 17)]
    b = [whole(t, shape[0], r, dtype=factor_dtype, seed=s) for s in (25, 26, 27)]
    k = -(-weight.numel() // 5)
    edges = [ops.factor_threshold(ai, bi, k) for ai, bi in zip(a, b, strict=True)]
    masks = [oracle.mask_of(oracle.importance(ai, bi), k) for ai, bi in zip(a, b, strict=True)]
    expected = oracle.merge(weight, donors, masks)
    ops.factor_sign_merge_(weight, donors, a, b, [v for v, _ in edges], [i for _, i in edges], [1.0] * 3)
    assert same_bits(weight, expected)


@pytest.mark.parametrize("factor_dtype", FACTOR_DTYPES)
@pytest.mark.parametrize(("shape", "t", "r"), SHAPES)
def test_random_factors_keep_exactly_k_and_differ_only_at_the_threshold(factor_dtype, shape, t, r):
    a, b = normal(t, r, shape[1], dtype=factor_dtype), normal(t, shape[0], r, dtype=factor_dtype, seed=1)
    f = oracle.importance(a, b)
    k = -(-f.numel() // 5)
    value, index = ops.factor_threshold(a, b, k)
    # a merge of ones into ones shows the mask: 2 where kept
    weight = torch.ones(shape)
    ops.factor_sign_merge_(weight, [torch.ones(shape)], [a], [b], [value], [index], [1.0])
    kept = weight == 2
    assert int(kept.sum()) == k
    wrong = kept != oracle.mask_of(f, k)
    at_the_threshold = (f - float(value)).abs() <= 1e-5 * float(value)
    assert not (wrong & ~at_the_threshold).any()


def test_merge_scales_and_views():
    weight, donor = normal(12, 10, dtype=torch.bfloat16).T, normal(12, 10, dtype=torch.bfloat16, seed=1).T
    f = normal(12, 10, seed=2).square().T
    value, index = ops.threshold(f, 60)
    expected = oracle.merge(weight, [donor], [oracle.mask_of(f, 60)], scale=0.5)
    ops.sign_merge_(weight, [donor], [f], [value], [index], [0.5])
    assert same_bits(weight, expected)


def test_merge_of_nothing():
    weight = normal(3, 4)
    before = weight.clone()
    ops.sign_merge_(weight, [], [], [], [], [])
    nothing, last = ops.threshold(torch.zeros(3, 4), 5)
    ops.sign_merge_(weight, [before.clone()], [torch.zeros(3, 4)], [nothing], [last], [1.0])
    assert torch.equal(weight, before)
    empty = torch.zeros(0, 4)
    value, index = ops.threshold(empty, 0)
    ops.sign_merge_(empty, [torch.zeros(0, 4)], [torch.zeros(0, 4)], [value], [index], [1.0])


# ---- the contract itself


def op_calls():
    a, b = normal(3, 2, 5), normal(3, 4, 2)
    f = normal(4, 5).square()
    value, index = torch.tensor(0.5), torch.tensor(3)
    op = torch.ops.gradpruner
    return {
        "gram_norm": (op.gram_norm, ([a[0], a[1]], [b[0], b[1]])),
        "square_accumulate_": (op.square_accumulate_, (f.clone(), normal(4, 5))),
        "outer_square_accumulate_": (op.outer_square_accumulate_, (f.clone(), a[0].clone(), b[0].clone())),
        "wgrad frozen": (op.wgrad_square_accumulate_, (f.clone(), normal(7, 5), normal(7, 4), None)),
        "wgrad trainable": (op.wgrad_square_accumulate_, (None, normal(7, 5), normal(7, 4), normal(4, 5))),
        "threshold": (op.threshold, (f, 7)),
        "factor_threshold": (op.factor_threshold, (a, b, 7)),
        "sign_merge_": (op.sign_merge_, (normal(4, 5), [normal(4, 5)], [f], [value], [index], [1.0])),
        "factor_sign_merge_": (
            op.factor_sign_merge_,
            (normal(4, 5), [normal(4, 5)], [a], [b], [value], [index], [1.0]),
        ),
    }


@pytest.mark.parametrize("name", op_calls())
def test_opcheck(name):
    op, args = op_calls()[name]
    results = torch.library.opcheck(op, placed(args))
    assert set(results.values()) == {"SUCCESS"}


def test_ops_that_copy_from_the_host_are_left_out_of_cuda_graphs():
    """Those whose Triton kernels get a table from pinned memory, and no others."""
    copying = {"gram_norm", "sign_merge_", "factor_sign_merge_"}
    every = {name: getattr(torch.ops.gradpruner, name) for name in ops.__all__ if hasattr(torch.ops.gradpruner, name)}
    assert len(every) == 12
    assert {n for n, op in every.items() if torch.Tag.cudagraph_unsafe in op.default.tags} == copying


def test_every_op_is_usable_under_compile():
    op = torch.ops.gradpruner

    def probe_and_merge(a, b, weight, donor):
        value, index = op.factor_threshold(a, b, 4)
        op.factor_sign_merge_(weight, [donor], [a], [b], [value], [index], [1.0])
        return op.gram_norm([a[0]], [b[0]]) * 2

    a, b, donor = placed((whole(2, 3, 5), whole(2, 4, 3, seed=1), normal(4, 5, seed=2)))
    plain, compiled = placed((normal(4, 5), normal(4, 5)))
    expected = probe_and_merge(a, b, plain, donor)
    got = torch.compile(probe_and_merge, fullgraph=True, backend="aot_eager")(a, b, compiled, donor)
    assert torch.equal(got, expected) and torch.equal(plain, compiled)


BAD_CALLS = {
    "pairs of unequal length": lambda: ops.gram_norm([normal(2, 3)], []),
    "ranks that differ": lambda: ops.gram_norm([normal(2, 3)], [normal(4, 3)]),
    "integers": lambda: ops.square_accumulate_(torch.zeros(3), torch.ones(3, dtype=torch.int64)),
    "igia in half": lambda: ops.square_accumulate_(torch.zeros(3, dtype=torch.float16), torch.ones(3)),
    "a shape that does not fit": lambda: ops.square_accumulate_(torch.zeros(3), torch.ones(4)),
    "k too large": lambda: ops.threshold(torch.ones(3), 4),
    "k negative": lambda: ops.factor_threshold(normal(1, 1, 2), normal(1, 2, 1), -1),
    "half factors": lambda: ops.factor_threshold(normal(1, 1, 2).half(), normal(1, 2, 1).half(), 1),
    "tokens that differ": lambda: ops.wgrad_square_accumulate_(None, normal(3, 2), normal(4, 2), None),
    "donor of another dtype": lambda: ops.sign_merge_(
        torch.ones(2), [torch.ones(2).half()], [torch.ones(2)], [torch.tensor(1.0)], [torch.tensor(0)], [1.0]
    ),
    "a threshold missing": lambda: ops.sign_merge_(
        torch.ones(2), [torch.ones(2)], [torch.ones(2)], [], [torch.tensor(0)], [1.0]
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused(name):
    with pytest.raises(InvalidArgument, match=r"expected|accepted"):
        BAD_CALLS[name]()


def test_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("GRADPRUNER_BACKEND", "cudnn")
    with pytest.raises(InvalidArgument, match="reference, triton, cpp"):
        ops.threshold(torch.ones(3), 1)


# ---- a selection that samples: what it does where the sample helps, and where it misleads


@pytest.fixture
def answered_from_the_bracket(monkeypatch):
    """Whether the last selection needed no pass but one over all entries; None on a backend that does not sample.

    The sample is as small a part as that of a large matrix.
    """
    if not INTERPRETING and not DEVICE:
        return lambda: None
    from gradpruner.kernels import selection, threshold
    from gradpruner.kernels.selection_state import DONE, new_state

    states = []

    def kept(device):
        state, histogram = new_state(device)
        states.append(state)
        return state, histogram

    monkeypatch.setattr(selection, "new_state", kept)
    monkeypatch.setattr(threshold, "SAMPLED", 3600)
    return lambda: bool(states[-1][DONE.value])


def sampled_entries(entries: int) -> torch.Tensor:
    """Flat indices that the dense selection samples in these tests: 128 of each 4096, at a place that wanders."""
    blocks = torch.arange(-(-entries // 4096))
    at = (blocks * 4096 + blocks * 7919 % 32 * 128)[:, None] + torch.arange(128)
    return at[at < entries]


def factors_that_differ_in_the_sample(n_out: int, n_in: int, low: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One step a row of 64 x 64 tiles: F is `low` of what it is elsewhere in the tiles that the selection samples."""
    rows, cols = -(-n_out // 64), -(-n_in // 64)
    a = normal(rows, 1, n_in).abs() + 0.1
    b = torch.zeros(rows, n_out, 1)
    for n in range(2 * max(rows, cols)):
        row, col = n % rows, (n % rows * 7919 + n // rows) % cols
        a[row, 0, col * 64 : col * 64 + 64] *= low
    for row in range(rows):
        b[row, row * 64 : row * 64 + 64, 0] = normal(n_out, seed=1)[row * 64 : row * 64 + 64].abs() + 0.1
    return a, b


@pytest.mark.parametrize("share", [0.001, 0.2, 0.7])
def test_threshold_of_many_entries_is_answered_from_the_bracket(share, answered_from_the_bracket):
    f = normal(300, 401).square()
    check_threshold(f, int(share * f.numel()))
    assert answered_from_the_bracket() in (None, True)


@pytest.mark.parametrize(("rows", "last_bits"), [(300, 0xFFF), (700, 0x7FFF)])  # Triton's buckets, and C++'s
@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("share", [0.2, 0.7])
def test_threshold_of_entries_at_the_ends_of_the_bracket(share, filled, rows, last_bits, answered_from_the_bracket):
    # a bracket ends where a bucket of the sample does, and so do these
    bits = normal(rows, 401).square().view(torch.int32) & ~last_bits
    f = (bits | last_bits if filled else bits).view(torch.float32)
    k = int(share * f.numel())
    value, index = ops.threshold(f, k)
    kept = torch.zeros(f.numel(), dtype=torch.bool)
    kept[f.flatten().argsort(descending=True, stable=True)[:k]] = True
    assert torch.equal(mask_from(f, value, index), kept.view(f.shape))
    if rows == 300:
        assert answered_from_the_bracket() in (None, True)


def test_threshold_is_exact_where_the_sample_lies(answered_from_the_bracket):
    f = normal(300, 400).square()
    f.view(-1)[sampled_entries(f.numel())] *= 1e-6
    check_threshold(f, f.numel() // 5)
    assert answered_from_the_bracket() in (None, False)


def test_threshold_is_exact_where_too_many_entries_tie(answered_from_the_bracket):
    check_threshold(torch.full((90, 100), 7.0), 5000)
    assert answered_from_the_bracket() in (None, False)


@pytest.mark.parametrize(("few", "scattered"), [(4096, False), (512, False), (64, True), (64, False)])
def test_threshold_is_exact_however_many_rounds_the_candidates_need(
    few, scattered, answered_from_the_bracket, monkeypatch
):
    """The boundary lies among 100 ties: after no round, one or two the candidates left are few, or never."""
    if INTERPRETING:
        import triton.language as tl

        from gradpruner.kernels import candidates

        monkeypatch.setattr(candidates, "FEW", tl.constexpr(few))
    if INTERPRETING or DEVICE:
        from gradpruner.kernels import threshold

        monkeypatch.setattr(threshold, "SAMPLED", 1 << 20)  # all
    steps = torch.arange(600).repeat(100) if scattered else torch.arange(600).repeat_interleave(100)
    f = torch.cat([1 + steps * 2.0**-12, normal(60300).square() % 1.0])
    check_threshold(f, 31050)
    assert answered_from_the_bracket() in (None, True)


def test_threshold_of_fewer_positive_entries_than_wanted():
    f = torch.zeros(90, 100)
    f[::7, ::9] = normal(13, 12).abs() + 0.1
    for k in (155, 156, 157, 8000):
        check_threshold(f, k)


@pytest.mark.parametrize(("low", "answered"), [(1.0, True), (1e-3, False)])
def test_factor_threshold_keeps_exactly_k_whatever_the_sample_says(low, answered, answered_from_the_bracket):
    shape = (200, 300)
    a, b = factors_that_differ_in_the_sample(*shape, low)
    k = 12000
    value, index = ops.factor_threshold(a, b, k)
    assert answered_from_the_bracket() in (None, answered)
    weight = torch.ones(shape)
    ops.factor_sign_merge_(weight, [torch.ones(shape)], [a], [b], [value], [index], [1.0])
    assert int((weight == 2).sum()) == k
    f = oracle.importance(a, b)
    wrong = (weight == 2) != oracle.mask_of(f, k)
    assert not (wrong & ((f - float(value)).abs() > 1e-5 * float(value))).any()


def test_factor_threshold_where_too_many_entries_tie(answered_from_the_bracket):
    a, b = torch.ones(1, 1, 100), torch.ones(1, 90, 1)
    value, index = ops.factor_threshold(a, b, 5000)
    assert (float(value), int(index)) == (1.0, 4999)
    assert answered_from_the_bracket() in (None, False)


def test_more_donors_than_one_launch_takes():
    weight, count = normal(9, 7, dtype=torch.bfloat16), 35
    donors = [normal(9, 7, dtype=torch.bfloat16, seed=s) for s in range(1, count + 1)]
    a = [whole(1, 1, 7, seed=s) for s in range(count)]
    b = [whole(1, 9, 1, seed=s + 99) for s in range(count)]
    edges = [ops.factor_threshold(ai, bi, 20) for ai, bi in zip(a, b, strict=True)]
    masks = [oracle.mask_of(oracle.importance(ai, bi), 20) for ai, bi in zip(a, b, strict=True)]
    expected = oracle.merge(weight, donors, masks)
    ops.factor_sign_merge_(weight, donors, a, b, [v for v, _ in edges], [i for _, i in edges], [1.0] * count)
    assert same_bits(weight, expected)
