"""sign_merge_ and factor_sign_merge_ are bit-exact."""

from __future__ import annotations

import oracle
import pytest
import torch
from op_inputs import FACTOR_DTYPES, INF, NAN, SHAPES, WEIGHT_DTYPES, normal, same_bits, whole

from gradpruner import ops

pytestmark = pytest.mark.usefixtures("backend")


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
