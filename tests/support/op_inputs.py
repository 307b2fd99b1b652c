"""Inputs of the ops, and how their results are compared."""

from __future__ import annotations

import os

import oracle
import torch

from gradpruner import ops

INF, NAN = float("inf"), float("nan")
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
WEIGHT_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FACTOR_DTYPES = [torch.float32, torch.bfloat16]
# (out, in), t, r: single entries, primes, powers of two, tall and wide
SHAPES = [((1, 1), 1, 1), ((7, 13), 3, 2), ((64, 48), 4, 8), ((33, 130), 2, 5), ((129, 3), 2, 17)]


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


def check_threshold(f: torch.Tensor, k: int) -> None:
    value, index = ops.threshold(f, k)
    assert value.dtype == torch.float32 and index.dtype == torch.int64
    assert torch.equal(mask_from(f, value, index), oracle.mask_of(f, k))
