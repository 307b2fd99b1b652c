"""The inputs of every op: one weight of a 1B model, LoRA of rank 8, 10 probe steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradpruner import ops

OUT, IN, RANK, STEPS, TOKENS = 2048, 2048, 8, 10, 1024

Case = Callable[[torch.device], Callable[[], Any]]  # a device, then what is timed


def _normal(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def _factors(device: torch.device) -> tuple[Tensor, Tensor]:
    return _normal(device, STEPS, RANK, IN), _normal(device, STEPS, OUT, RANK)


def gram_norm(device: torch.device) -> Callable[[], Any]:
    """All pairs of a step: 112 of them, as 16 layers of 7 weights have."""
    a = [_normal(device, RANK, IN) for _ in range(112)]
    b = [_normal(device, OUT, RANK) for _ in range(112)]
    return lambda: ops.gram_norm(a, b)


def square_accumulate_(device: torch.device) -> Callable[[], Any]:
    """A bfloat16 gradient into float32."""
    igia, grad = torch.zeros(OUT, IN, device=device), _normal(device, OUT, IN, dtype=torch.bfloat16)
    return lambda: ops.square_accumulate_(igia, grad)


def outer_square_accumulate_(device: torch.device) -> Callable[[], Any]:
    """One step's pair."""
    igia, a, b = torch.zeros(OUT, IN, device=device), _normal(device, RANK, IN), _normal(device, OUT, RANK)
    return lambda: ops.outer_square_accumulate_(igia, a, b)


def wgrad_square_accumulate_(device: torch.device) -> Callable[[], Any]:
    """A frozen weight, float32 activations."""
    x, dy = _normal(device, TOKENS, IN), _normal(device, TOKENS, OUT)
    igia = torch.zeros(OUT, IN, device=device)
    return lambda: ops.wgrad_square_accumulate_(igia, x, dy, None)


def threshold(device: torch.device) -> Callable[[], Any]:
    """Top 20 % of a dense importance."""
    igia = _normal(device, OUT, IN).square()
    return lambda: ops.threshold(igia, igia.numel() // 5)


def factor_threshold(device: torch.device) -> Callable[[], Any]:
    """Top 20 % of an importance given by its factors."""
    a, b = _factors(device)
    return lambda: ops.factor_threshold(a, b, OUT * IN // 5)


def sign_merge_(device: torch.device) -> Callable[[], Any]:
    """Three donors, bfloat16 weights, dense importance."""
    weight, donors, edges = _merge_inputs(device)
    igias = [_normal(device, OUT, IN).square() for _ in donors]
    values, indices = [v for v, _ in edges], [i for _, i in edges]
    return lambda: ops.sign_merge_(weight, donors, igias, values, indices, [1.0] * 3)


def factor_sign_merge_(device: torch.device) -> Callable[[], Any]:
    """Three donors, bfloat16 weights, importance from factors."""
    weight, donors, edges = _merge_inputs(device)
    factors = [_factors(device) for _ in donors]
    a, b = [a for a, _ in factors], [b for _, b in factors]
    values, indices = [v for v, _ in edges], [i for _, i in edges]
    return lambda: ops.factor_sign_merge_(weight, donors, a, b, values, indices, [1.0] * 3)


def _merge_inputs(device: torch.device) -> tuple[Tensor, list[Tensor], list[tuple[Tensor, Tensor]]]:
    weight = _normal(device, OUT, IN, dtype=torch.bfloat16)
    donors = [_normal(device, OUT, IN, dtype=torch.bfloat16) for _ in range(3)]
    edge = torch.tensor(1.0, device=device), torch.tensor(-1, device=device)
    return weight, donors, [edge] * 3


CASES: dict[str, Case] = {
    function.__name__: function
    for function in (
        gram_norm,
        square_accumulate_,
        outer_square_accumulate_,
        wgrad_square_accumulate_,
        threshold,
        factor_threshold,
        sign_merge_,
        factor_sign_merge_,
    )
}
