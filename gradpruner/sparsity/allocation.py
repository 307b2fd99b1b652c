"""Which share of each decoder layer goes, so that together it is the share that was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from gradpruner.checks import check_choice
from gradpruner.errors import InvalidArgument

ALLOCATIONS = ("uniform", "alphapruning")
SPREAD = 0.3  # how far from 1 the layers' ratios lie before they are scaled


def hill_exponent(weight: Tensor) -> float:
    """1 + k / sum over the k largest eigenvalues of log(eigenvalue / the smallest of them), k half of them, float64.

    Of W^T W, whose eigenvalues are the squared singular values. Small: a heavy tail, a layer that learnt much.
    Source: docs/method.md, section 7 (AlphaPruning, Lu et al. 2024).
    """
    values = torch.linalg.svdvals(weight.double()).square().sort().values
    values = values[values > values[-1:] * torch.finfo(torch.float64).eps * max(weight.shape)]  # the others are zero
    tail = values[len(values) // 2 :]
    logs = (tail / tail[:1]).log().sum()
    return float(1 + len(tail) / logs) if len(tail) and float(logs) > 0 else float("inf")


def alphapruning(exponents: Sequence[float], entries: Sequence[int], ratio: float) -> list[float]:
    """The share of each layer: linear in its mean exponent, 1 - SPREAD to 1 + SPREAD of one another, `ratio` over all.

    exponents, entries: one a layer. Raises InvalidArgument where a layer would lose all of its weights.
    """
    low, high = min(exponents), max(exponents)
    if not high < float("inf"):
        raise InvalidArgument("allocation = 'alphapruning': a weight has no spectrum (rank 0 or 1); expected uniform")
    width = high - low
    relative = [1 - SPREAD + 2 * SPREAD * ((e - low) / width if width else 0.5) for e in exponents]
    scale = ratio * sum(entries) / sum(r * n for r, n in zip(relative, entries, strict=True))
    shares = [scale * r for r in relative]
    if max(shares) >= 1:
        raise InvalidArgument(f"ratio = {ratio}: alphapruning would take {max(shares):.2f} of a layer; expected less")
    return shares


def check_allocation(allocation: str) -> None:
    """Raises InvalidArgument for one that is not known."""
    check_choice("allocation", allocation, ALLOCATIONS)


def allocate(weights: Mapping[int, Sequence[Tensor]], ratio: Fraction, allocation: str) -> dict[int, float]:
    """The share of every layer, by index. weights: those of each layer that are pruned. allocation: a known one.

    Raises InvalidArgument.
    """
    if allocation == "uniform":
        return dict.fromkeys(weights, float(ratio))
    exponents = [sum(map(hill_exponent, of)) / len(of) for of in weights.values()]
    entries = [sum(w.numel() for w in of) for of in weights.values()]
    return dict(zip(weights, alphapruning(exponents, entries, float(ratio)), strict=True))
