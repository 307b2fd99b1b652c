"""What a comparison claims: the headline, the planned number of layers, and models against the dense one."""

from __future__ import annotations

import math

import pytest
from comparison_pages import RESULTS, differences, result

from gradpruner.compare.analysis import Comparison, headline, spread


@pytest.mark.parametrize(
    ("intervals", "words"),
    [
        ([(0.01, 0.2), (0.1, 0.3)], ", ahead of 2 of 2 other methods."),
        ([(0.01, 0.2), (-0.1, 0.3)], ", ahead of 1 of 2 other methods, level with drop-last."),
        ([(-0.01, 0.2), (-0.1, 0.3)], ", level with laco and drop-last, ahead of none."),
        ([(-0.2, -0.1), (0.1, 0.3)], ", ahead of 1 of 2 other methods, behind laco."),
        ([(-0.2, -0.1), (0.0, 0.3)], ", behind laco, level with drop-last, ahead of none."),
        ([(0.1, 0.2)], ", ahead of 1 of 2 other methods, without an interval against drop-last."),
        ([], ", without an interval against laco and drop-last."),
    ],
)
def test_headline_claims_what_the_intervals_do(intervals, words):
    known = differences(**dict(zip(["laco", "drop-last"], intervals, strict=False)))
    sentence = headline(Comparison(RESULTS, known))
    assert sentence == f"With 4 of 10 layers removed, gradpruner keeps 0.760 of 0.800 exact match (−5.0 %){words}"


def test_headline_of_other_cases():
    behind, ahead = (differences(**{"gradpruner:merge=0": ends}) for ends in ((-0.2, -0.1), (0.1, 0.2)))
    assert headline(Comparison(RESULTS, behind)).endswith("behind its own variant gradpruner:merge=0.")
    assert "gradpruner:merge=0" not in headline(Comparison(RESULTS, ahead))
    start = "With 4 of 10 layers removed, "
    alone = [result("gradpruner", 4, 0, 0.7)]
    assert headline(Comparison(alone)) == f"{start}gradpruner reaches 0.700 exact match."
    better = [*alone, result("dense", 0, 0, 0.5), result("laco", 4, 0, 0.6)]
    assert headline(Comparison(better, differences(laco=(0.05, 0.15)))) == (
        f"{start}gradpruner reaches 0.700 exact match, the dense model 0.500 (+40.0 %), ahead of laco."
    )
    perplexity = [
        result("dense", 0, 0, None, perplexity=3.0),
        result("laco", 4, 0, None, perplexity=3.3),
    ]
    assert headline(Comparison(perplexity)) == (f"{start}laco reaches 3.30 perplexity, the dense model 3.00 (+10.0 %).")
    assert headline(Comparison([result("laco", 4, 0, None)])) == f"{start}laco was not scored."


def test_main_number_is_the_one_with_most_seeds_then_the_planned_one():
    results = [result("gradpruner", count, 0, 0.7) for count in (2, 3, 5)]
    assert Comparison(results).main == 3
    assert Comparison(results, planned=2).main == 2
    assert Comparison([*results, result("gradpruner", 5, 1, 0.7)], planned=2).main == 5


def test_a_model_is_held_against_the_dense_one_of_its_own_seeds():
    dense = [result("dense", 0, 0, 0.8), result("dense", 0, 1, 0.6)]
    found = Comparison([*dense, result("gradpruner", 12, 0, 0.8), result("shortgpt", 12, 7, 0.7)], {}, 12)
    assert found.relative("gradpruner") == pytest.approx(0)
    assert found.relative("shortgpt") == pytest.approx(0)  # no seed in common: against all of them
    assert "0.800 of 0.800" in headline(found, [])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_that_diverged_has_its_place_in_a_spread(value):
    """Its loss or perplexity is not finite. The other seeds have a report all the same."""
    scores = spread([2.0, value, None])
    assert scores is not None and scores.seeds == 2 and math.isnan(scores.deviation)
    assert not math.isfinite(scores.mean) and scores.low == 2.0
    assert spread([2.0, 4.0]).deviation == pytest.approx(math.sqrt(2))
