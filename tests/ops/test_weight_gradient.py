"""wgrad_square_accumulate_ against float64."""

from __future__ import annotations

import math

import pytest
import torch
from op_inputs import INF, NAN, WEIGHT_DTYPES, normal, relative_rms, whole

from gradpruner import ops

pytestmark = pytest.mark.usefixtures("backend")


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
