"""The variants of a sensitivity study, and their scores."""

from __future__ import annotations

import pytest
from small_comparisons import KIND, OTHER, USUAL, comparison, counting, result

from gradpruner.compare import sensitivity
from gradpruner.compare.sensitivity_factors import FACTORS
from gradpruner.methods import GradPruner, parse_method


def everything():
    return sensitivity.variants({factor: values for factor, (_, _, values) in FACTORS.items()}, USUAL)


def test_one_factor_at_a_time():
    rows = everything()
    assert [(r["factor"], r["value"]) for r in rows] == [(f, str(v)) for f, (_, _, vs) in FACTORS.items() for v in vs]
    for row in rows:
        option, also, _ = FACTORS[row["factor"]]
        usual, options = parse_method("gradpruner").options, parse_method(row["method"]).options
        changed = {k for k, v in options.items() if v != usual[k]}
        beside = {also.partition("=")[0]} - {""}
        if row["is_default"]:
            assert not changed
            continue
        assert beside <= changed <= {option, *beside} and str(options[option]) == row["value"]


def test_a_default_is_flagged_once_a_factor():
    usual, flagged = {**vars(GradPruner().settings), **USUAL}, {}
    for row in everything():
        flagged.setdefault(row["factor"], []).extend([row["value"]] * row["is_default"])
    for factor, values in flagged.items():
        option, also, known = FACTORS[factor]
        # what needs something else beside it to matter is not the default, whatever its value
        assert values == [str(usual[option])] * (not also and usual[option] in known)
    assert flagged["probe steps"] == ["20"] and flagged["rank of the probe"] == ["8"]
    assert flagged["layer score"] == [KIND] and flagged["share of a merged weight"] == []


def test_all_defaults_are_one_method():
    rows = everything()
    assert {r["method"] for r in rows if r["is_default"]} == {"gradpruner"}
    others = [r["method"] for r in rows if not r["is_default"]]
    assert "gradpruner" not in others
    assert {m for m in others if others.count(m) > 1} == {"gradpruner:merge=3"}  # with the usual share of it, too


def test_no_variant_is_trained_twice(home, tmp_path):
    """merge=3 is a value of one factor, and top=0.2 with merge=3 one of another."""
    rows = sensitivity.variants({"layers merged": (1,), "layer score": (KIND,)}, USUAL)
    methods = [*dict.fromkeys(r["method"] for r in rows), "gradpruner:merge=1,top=0.2"]  # which is the usual share
    with counting() as calls:
        made = comparison(home, tmp_path / "out", methods, (0,), dense=False)
        made.work()
    keys = {cell["method"]: cell["trained"] for cell in made.finished()}
    assert keys.keys() == {"gradpruner:merge=1", "gradpruner"}
    assert len(calls["tune"]) == len(set(keys.values())) and len(calls["watch"]) == 1


def test_scored_is_the_mean_over_seeds_of_what_is_done():
    rows = sensitivity.variants({"layer score": (KIND, OTHER, "normalized")}, USUAL)
    done = [
        result("gradpruner", 0.5),
        result("gradpruner", 0.7, 1),
        result(f"gradpruner:kind={OTHER}", None),
        result("dense", 0.8, count=0),
        result("dense", 0.9, 1, count=0),
    ]
    # of the same folder, but not tried with the others
    done += [result("gradpruner", 0.1, 2), result("gradpruner", 0.2, count=3), result("dense", 0.1, 2, count=0)]
    scored = sensitivity.scored({"rows": rows, "count": 2, "seeds": [0, 1]}, done)
    assert scored == [{**rows[0], "exact_match": pytest.approx(0.6), "dense": pytest.approx(0.85)}]


def test_a_default_given_as_text_is_a_default():
    rows = sensitivity.variants({"probe steps": ["20"], "rank of the probe": ["8"]}, USUAL)
    assert [r["is_default"] for r in rows] == [True, True] and {r["method"] for r in rows} == {"gradpruner"}
