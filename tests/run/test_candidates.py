"""Margins between the scores of layers, and the counts that they propose to a search."""

from __future__ import annotations

import pytest
from margins import margin_at

from gradpruner.errors import InvalidArgument
from gradpruner.probe.selection import margin
from gradpruner.run.auto_ratio import candidates

# twelve layers, the first one protected; in order 1, 2, 3, 30, 31, 32, 33, 330, 331, 332, 333
SCORES = [9e9, 333.0, 1.0, 30.0, 331.0, 2.0, 31.0, 332.0, 3.0, 32.0, 330.0, 33.0]


def test_a_margin_takes_protected_layers_from_any_iterable():
    assert margin([1.0, 2.0, 3.0, 8.0], [0], iter([1, 2])) == pytest.approx(1 - 1 / 8)


def test_a_margin_is_between_the_highest_removed_and_the_lowest_kept():
    assert margin_at(SCORES, 3) == pytest.approx(1 - 3 / 30)
    assert margin_at(SCORES, 7) == pytest.approx(1 - 33 / 330)
    assert margin_at([5.0, 2.0, 2.0, 4.0], 1) == 0
    assert margin_at([5.0, 0.0, 0.0, 4.0], 1) == 0 and margin_at([5.0, 0.0, 0.0, 4.0], 2) == 1
    assert margin_at([5.0, 1.0, 2.0], 0) == 0 and margin_at([5.0, 1.0, 2.0], 2) == 0  # nothing on one of the two sides
    assert margin_at([1.0, 5.0, 2.0], 1, protect=()) == 0.5 and margin_at([1.0, 5.0, 2.0], 1, protect=(0, 1)) == 0


def test_candidates_have_the_largest_margins_of_their_part_of_the_range():
    # 2 to 7 of 12 layers, in parts: 2 | 3 | 4 | 5 | 6, 7
    assert candidates(SCORES) == [2, 3, 4, 5, 7]
    # 3 to 18 of 30, in parts: 3-5, 6-8, 9-11, 12-14, 15-18
    scores = [0.0, *(float(2**j) for j in range(29))]
    assert candidates(scores) == [3, 6, 9, 12, 15]  # all margins alike: the smaller counts
    for last in (5, 7, 11, 13, 18):
        scores = [0.0, *(1.0 + j + 1e3 * (j >= last) for j in range(29))]
        assert last in candidates(scores), last
    steep = candidates([7.0] * 4 + [0.0] * 26)  # zeros among zeros, and no part with a margin
    assert steep == [3, 6, 9, 12, 15]
    assert candidates([1.0, 0.0, 0.0, 0.0, 0.0, 3.0, 3.0, 3.0, 3.0, 3.0]) == [1, 2, 3, 4, 5]


def test_candidates_stay_inside_what_can_be_removed():
    assert candidates(SCORES, least=6) == [6, 7]
    assert candidates([1.0, 2.0]) == [1]
    assert candidates([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], protect=(0, 1, 2, 5)) == [1, 2]
    for layers in range(2, 40):
        counts = candidates([float(j) for j in range(layers)])
        assert counts == sorted(set(counts)) and 1 <= len(counts) <= 5
        assert layers / 10 <= counts[0] and counts[-1] <= max(1, 0.6 * layers)
    with pytest.raises(InvalidArgument, match="ratio = 'auto' of 1 layers"):
        candidates([1.0])
    with pytest.raises(InvalidArgument, match="no count is from 9 to 7"):
        candidates(SCORES, least=9)
