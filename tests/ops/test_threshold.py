"""threshold and factor_threshold: exactly the k largest, ties, special values."""

from __future__ import annotations

import oracle
import pytest
import torch
from op_inputs import FACTOR_DTYPES, INF, NAN, SHAPES, check_threshold, mask_from, normal, whole

from gradpruner import ops

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("shape", [(1,), (7, 13), (130, 33), (3, 5, 7)])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.57, 1.0])
def test_threshold_keeps_exactly_the_k_largest(shape, share):
    f = normal(*shape).square()
    check_threshold(f, int(share * f.numel()))


def test_threshold_ties_go_to_the_lower_index():
    f = torch.tensor([[2.0, 1.0, 2.0, 1.0], [1.0, 3.0, 1.0, 0.0]])
    for k in range(9):
        check_threshold(f, k)
    check_threshold(whole(40, 41, low=0, high=4), 500)
    check_threshold(torch.full((33, 65), 7.0), 1000)


@pytest.mark.parametrize("exponent", [-149, -140, -126, -30, 0, 100, 127])
def test_threshold_over_the_whole_range_of_float32(exponent):
    f = (torch.arange(1, 101, dtype=torch.float64) * 2.0**exponent).float()
    check_threshold(f.flip(0), 37)


def test_threshold_of_special_values():
    f = torch.tensor([NAN, 1.0, INF, 0.0, -0.0, -1.0, 5.0, 1e-45, INF, -INF])
    for k in range(11):
        check_threshold(f, k)
    value, index = ops.threshold(torch.zeros(3, 3), 4)
    assert float(value) == INF and int(index) == -1


def test_threshold_of_a_view_uses_the_order_of_the_view():
    check_threshold(whole(12, 9, low=0, high=3).T, 30)
    check_threshold(normal(20, 30).square()[:, ::3], 17)


@pytest.mark.parametrize("dtype", FACTOR_DTYPES)
@pytest.mark.parametrize(("shape", "t", "r"), SHAPES)
def test_factor_threshold_is_exact_where_f_is(dtype, shape, t, r):
    a, b = whole(t, r, shape[1], dtype=dtype), whole(t, shape[0], r, dtype=dtype, seed=1)
    f = oracle.importance(a, b)
    for k in {0, 1, f.numel() // 5, f.numel() // 2, f.numel()}:
        value, index = ops.factor_threshold(a, b, k)
        assert torch.equal(mask_from(f.float(), value, index), oracle.mask_of(f, k))


def test_factor_threshold_of_no_steps_and_no_rank():
    for a, b in [(torch.zeros(0, 2, 5), torch.zeros(0, 4, 2)), (torch.zeros(3, 0, 5), torch.zeros(3, 4, 0))]:
        value, index = ops.factor_threshold(a, b, 3)
        assert float(value) == INF and int(index) == -1


def test_threshold_of_fewer_positive_entries_than_wanted():
    f = torch.zeros(90, 100)
    f[::7, ::9] = normal(13, 12).abs() + 0.1
    for k in (155, 156, 157, 8000):
        check_threshold(f, k)
