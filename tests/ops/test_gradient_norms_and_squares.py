"""gram_norm, square_accumulate_ and outer_square_accumulate_ against float64."""

from __future__ import annotations

import math

import pytest
import torch
from op_inputs import FACTOR_DTYPES, INF, NAN, SHAPES, WEIGHT_DTYPES, normal, relative_rms

from gradpruner import ops

pytestmark = pytest.mark.usefixtures("backend")


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
