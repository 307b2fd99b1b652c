"""The paired bootstrap: its interval, its pairing, its seed, and what it refuses."""

from __future__ import annotations

import math
import random

import pytest

from gradpruner.compare.bootstrap import paired_difference
from gradpruner.errors import InvalidArgument


def test_the_interval_is_that_of_the_normal_approximation_for_many_examples():
    source = random.Random(0)
    theirs = [float(source.random() < 0.6) for _ in range(2000)]
    ours = [t if source.random() < 0.9 else 1.0 for t in theirs]
    pairs = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = sum(pairs) / len(pairs)
    error = math.sqrt(sum((p - mean) ** 2 for p in pairs)) / len(pairs)
    found = paired_difference([ours], [theirs])
    assert found.mean == pytest.approx(mean)
    assert found.low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)
    assert found.standing == "ahead"
    assert paired_difference([theirs], [ours]).standing == "behind"


def test_pairing_matters_and_runs_are_averaged():
    right, wrong = [1.0, 0.0] * 50, [0.0, 1.0] * 50
    same = paired_difference([right], [right])
    assert (same.mean, same.low, same.high, same.standing) == (0, 0, 0, "level")
    assert paired_difference([right, wrong], [wrong, right]) == same
    assert paired_difference([right], [wrong]).low < -0.1  # as means alone they would be equal too, with no spread


def test_a_seed_repeats_itself_and_another_one_draws_anew():
    source = random.Random(0)
    a, b = ([[source.random() for _ in range(300)]] for _ in range(2))
    first, again, other = (paired_difference(a, b, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first.mean == other.mean and first.low != other.low and first.high != other.high


@pytest.mark.parametrize(
    ("ours", "theirs"), [([], [[1.0]]), ([[1.0]], []), ([[1.0, 0.0]], [[1.0]]), ([[]], [[]])], ids=str
)
def test_other_examples_are_refused(ours, theirs):
    with pytest.raises(InvalidArgument, match="same examples"):
        paired_difference(ours, theirs)
