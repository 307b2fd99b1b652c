"""When two models' answers count as the same."""

from __future__ import annotations

import pytest
import torch

from gradpruner.logits import differ


@pytest.mark.parametrize(("gap", "dtype", "same"), [
    (1.1e-5, torch.float32, True),  # what a weight's place in memory was seen to do
    (1e-4, torch.float32, False),  # what a rule of attention was seen to do
    (2e-3, torch.bfloat16, True),
    (2e-2, torch.bfloat16, False),
])  # fmt: skip
def test_rounding_is_told_from_another_answer(gap, dtype, same):
    expected = torch.linspace(-1, 1, 50)[None]
    actual = expected.clone()
    actual[0, 7] += gap
    assert (differ(expected, actual, dtype) is None) is same


def test_what_is_not_finite_must_be_so_in_both():
    expected = torch.tensor([[1.0, float("-inf")]])
    assert differ(expected, expected.clone(), torch.float32) is None
    assert differ(expected, torch.tensor([[1.0, 2.0]]), torch.float32) == float("inf")
