"""AlphaPruning: the exponent of a known spectrum, and shares that add up."""

from __future__ import annotations

import math

import pytest
import torch

from gradpruner.errors import InvalidArgument
from gradpruner.sparsity.allocation import SPREAD, allocate, alphapruning, hill_exponent


def test_exponent_of_a_known_spectrum():
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 8))[0] for n in (12, 8))
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])  # eigenvalues of W^T W
    weight = left @ torch.diag(values.sqrt()) @ right.T
    expected = 1 + 4 / sum(math.log(v / 5) for v in (5, 6, 7, 8))
    assert hill_exponent(weight) == pytest.approx(expected, rel=1e-5)
    assert hill_exponent(weight.T * 3) == pytest.approx(expected, rel=1e-5)  # neither side nor scale matters
    assert hill_exponent(torch.zeros(3, 3)) == hill_exponent(torch.ones(3, 3)) == math.inf


def test_shares_are_linear_in_the_exponent_and_add_up():
    shares = alphapruning([2.0, 3.0, 4.0], [100, 100, 400], 0.4)
    assert sum(s * n for s, n in zip(shares, [100, 100, 400], strict=True)) == pytest.approx(0.4 * 600)
    assert shares[2] / shares[0] == pytest.approx((1 + SPREAD) / (1 - SPREAD))
    assert shares[1] - shares[0] == pytest.approx(shares[2] - shares[1])
    assert alphapruning([2.0, 2.0], [10, 10], 0.5) == pytest.approx([0.5, 0.5])
    with pytest.raises(InvalidArgument, match="alphapruning would take"):
        alphapruning([2.0, 3.0], [100, 100], 0.9)


def test_a_layer_has_the_mean_exponent_of_its_weights():
    torch.manual_seed(0)
    weights = {j: [torch.randn(16, 12), torch.randn(8, 12) @ torch.diag(torch.arange(12.0) ** j)] for j in range(3)}
    shares = allocate(weights, 0.5, "alphapruning")
    means = {j: sum(map(hill_exponent, of)) / 2 for j, of in weights.items()}
    assert sorted(shares, key=shares.get) == sorted(means, key=means.get)
    assert allocate(weights, 0.5, "uniform") == {0: 0.5, 1: 0.5, 2: 0.5}
