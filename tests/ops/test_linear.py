"""The linear that squares its weight's gradient, beside torch's own: the same bits forwards and backwards."""

from __future__ import annotations

import contextlib

import pytest
import torch
from on_device import DEVICE
from torch import nn
from torch.nn import functional

from gradpruner.errors import InvalidArgument
from gradpruner.ops.linear import WeightSquares, linear_square_accumulate

pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.skipif(bool(DEVICE), reason="another device's products have other bits than the CPU's"),
]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squares_of(weight):
    return WeightSquares(torch.zeros((), dtype=torch.float64), torch.zeros(weight.shape))


def both_ways(call, dtype, *, autocast, trains=False, bias=True, transposed=False):
    """Output, dx, the weight's gradient and the bias's, of one way to compute a linear."""
    x = normal(3, 5, 24).to(dtype).requires_grad_(True)
    weight = nn.Parameter(normal(24, 16, seed=1).to(dtype) if transposed else normal(16, 24, seed=1).to(dtype), trains)
    shift = nn.Parameter(normal(16, seed=2).to(dtype)) if bias else None
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        y = call(x, weight, shift)
    y.backward(normal(3, 5, 16, seed=3).to(y.dtype))
    return y.detach(), x.grad, weight.grad, None if shift is None else shift.grad


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, True), (torch.float32, False), (torch.bfloat16, False), (torch.float64, True)],
)
def test_output_and_gradients_are_torchs_own_to_the_bit(dtype, autocast, bias, transposed):
    def plain(x, weight, shift):
        return functional.linear(x, weight.t() if transposed else weight, shift)

    def squared(x, weight, shift):
        return linear_square_accumulate(x, weight, shift, squares_of(weight), transposed=transposed)

    options = {"autocast": autocast, "bias": bias, "transposed": transposed}
    want, got = both_ways(plain, dtype, **options), both_ways(squared, dtype, **options)
    assert want[0].dtype == (torch.bfloat16 if autocast and dtype == torch.float32 else dtype)
    for one, other in zip(want, got, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one.dtype == other.dtype and torch.equal(one, other))


@pytest.mark.parametrize("transposed", [False, True])
def test_under_autocast_products_are_of_its_dtype_and_the_gradient_of_the_weights(transposed):
    seen = []

    def squared(x, weight, shift):
        seen.append(squares_of(weight))
        y = linear_square_accumulate(x, weight, shift, seen[-1], transposed=transposed)
        seen.append([saved.dtype for saved in y.grad_fn.saved_tensors])
        return y

    options = {"autocast": True, "bias": False, "transposed": transposed}
    y, _, grad, _ = both_ways(squared, torch.float32, trains=True, **options)
    assert y.dtype == torch.bfloat16 and seen[1] == [torch.bfloat16, torch.bfloat16, torch.float32]
    x, dy = normal(3, 5, 24).bfloat16().double().view(15, 24), normal(3, 5, 16, seed=3).bfloat16().double().view(15, 16)
    want = x.T @ dy if transposed else dy.T @ x
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen[0].igia.double(), want.square(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen[0].total, want.square().sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("through_dy", [False, True])
def test_a_second_derivative_is_refused(trains, through_dy):
    """Also where only the weight's own path would be missing, which torch's once_differentiable lets pass."""
    x, weight = normal(3, 4).requires_grad_(True), nn.Parameter(normal(2, 4, seed=1), trains)
    y = linear_square_accumulate(x, weight, None, squares_of(weight))
    loss = y.square().sum() if through_dy else y.sum()
    with pytest.raises(InvalidArgument, match="create_graph = True"):
        torch.autograd.grad(loss, x, create_graph=True)
    assert weight.grad is None
