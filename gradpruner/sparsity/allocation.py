"""How the share of zeroed weights is spread over the decoder layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from gradpruner.checks import check_choice
from gradpruner.errors import InvalidArgument

ALLOCATIONS = ("uniform", "alphapruning")
SPREAD = 0.3  # before scaling, the shares of the layers lie between 1 - SPREAD and 1 + SPREAD


def hill_exponent(weight: Tensor) -> float:
    """Estimate how heavy the tail of a weight's spectrum is.

    A small exponent means a heavy tail, of a layer that learned much. The Hill estimator is 1 + k / sum of log(λ_i /
    λ_min) over the k largest eigenvalues λ_i of Wᵀ W. k is half of the eigenvalues above zero, λ_min the smallest of
    the k. Eigenvalues are the squared singular values of W, in float64.

    Args:
        weight: (out, in) or (in, out), any float dtype.

    Returns:
        The exponent. Infinite for a weight of rank 0 or 1.

    Source: docs/method.md, section 7 (AlphaPruning, Lu et al. 2024).
    """
    eigenvalues = torch.linalg.svdvals(weight.double()).square().sort().values
    # smaller ones are rounding errors of zero
    eigenvalues = eigenvalues[eigenvalues > eigenvalues[-1:] * torch.finfo(torch.float64).eps * max(weight.shape)]
    tail = eigenvalues[len(eigenvalues) // 2 :]
    logs = (tail / tail[:1]).log().sum()
    return float(1 + len(tail) / logs) if len(tail) and float(logs) > 0 else float("inf")


def alphapruning(exponents: Sequence[float], entries: Sequence[int], ratio: float) -> list[float]:
    """Give each layer a share that grows linearly with its exponent.

    The layer with the smallest exponent gets 1 - SPREAD, the one with the largest 1 + SPREAD. All are then scaled so
    that together they are `ratio`.

    Args:
        exponents: the mean `hill_exponent` of each layer.
        entries: the number of prunable entries of each layer.
        ratio: share of all entries that is zeroed.

    Returns:
        The share of each layer that is zeroed, above 0 and below 1.

    Raises:
        InvalidArgument: a layer would lose all of its weights, or a weight has no spectrum.
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
    """Check that an allocation is known. Raises InvalidArgument."""
    check_choice("allocation", allocation, ALLOCATIONS)


def allocate(weights: Mapping[int, Sequence[Tensor]], ratio: Fraction, allocation: str) -> dict[int, float]:
    """Compute the share of each layer that is zeroed.

    Args:
        weights: for each layer, the weights that are pruned.
        ratio: share of all their entries that is zeroed.
        allocation: one of `ALLOCATIONS`.

    Returns:
        The share of each layer, by its index.

    Raises:
        InvalidArgument: as in `alphapruning`.
    """
    if allocation == "uniform":
        return dict.fromkeys(weights, float(ratio))
    exponents = [sum(map(hill_exponent, matrices)) / len(matrices) for matrices in weights.values()]
    entries = [sum(matrix.numel() for matrix in matrices) for matrices in weights.values()]
    return dict(zip(weights, alphapruning(exponents, entries, float(ratio)), strict=True))
