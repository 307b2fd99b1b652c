"""Thresholds in plain torch are exact."""

from __future__ import annotations

import pytest
import torch

from benchmarks.ops.plain_torch import _kth_value, _sampled_value, _top_value


@pytest.mark.parametrize("size", [50, 70_000, 300_001])
@pytest.mark.parametrize("share", [0.001, 0.2, 0.99, 1.0])
def test_the_sampled_threshold_is_exact(size, share):
    igia = torch.randn(size, generator=torch.Generator().manual_seed(1)).square()
    k = max(1, int(share * size))
    right = igia.sort(descending=True).values[k - 1]
    assert _sampled_value(igia, k) == _kth_value(igia, k) == _top_value(igia, k) == right


def test_the_sampled_threshold_survives_ties():
    igia = torch.zeros(100_000)
    igia[::7] = 1.0
    assert _sampled_value(igia, 200) == 1.0 and _sampled_value(igia, 50_000) == 0.0
