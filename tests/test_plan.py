from __future__ import annotations

import json

import pytest

from gradpruner import CheckpointError, InvalidArgument, Plan
from gradpruner.probe.selection import lowest_first, margin, select

SCORES = [9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0, 5.0, 10.0]


def test_lowest_scores_go_and_the_highest_of_them_merge():
    plan = select(SCORES, ratio=0.4, merge="auto")
    assert plan.removed == (1, 3, 5, 7)
    assert plan.drop == (1, 3, 5)  # round(0.3 * 10) lowest
    assert plan.merge == {7: 6} and plan.donors == {6: (7,)}
    assert plan.layer_ratio == 0.4 and plan.kept == (0, 2, 4, 6, 8, 9)


def test_the_papers_plan_of_13_of_32():
    scores = [float(100 - j) for j in range(32)]  # the later the weaker
    plan = select(scores, ratio=0.4, merge="auto")
    assert len(plan.removed) == 13 and len(plan.drop) == 10 and set(plan.merge) == {19, 20, 21}
    assert plan.donors == {18: (19, 20, 21)}


@pytest.mark.parametrize(("merge", "folded"), [("auto", 1), (0, 0), (2, 2), (4, 4)])
def test_number_folded(merge, folded):
    plan = select(SCORES, count=4, merge=merge)
    assert len(plan.merge) == folded and plan.removed == (1, 3, 5, 7)


def test_ties_keep_the_lower_index():
    assert select([1.0] * 6, count=2, merge=0, protect=()).removed == (4, 5)


def test_layer_0_is_protected_and_others_on_request():
    scores = [0.0, 1.0, 2.0, 3.0]
    assert select(scores, count=1, merge=0).removed == (1,)
    assert select(scores, count=1, merge=0, protect=()).removed == (0,)
    assert select(scores, count=1, merge=0, protect=(0, 1)).removed == (2,)


def test_the_margin_of_a_cut():
    assert lowest_first(SCORES)[:3] == [1, 3, 5] and lowest_first([1.0] * 3, ()) == [2, 1, 0]
    assert margin(SCORES, [1, 3, 5]) == pytest.approx(1 - 3 / 4)
    assert margin(SCORES, [1, 3, 7]) == pytest.approx(1 - 4 / 3)  # by hand: a kept layer scores lower
    assert margin(SCORES, [1, 3, 5], protect=(0, 7)) == pytest.approx(1 - 3 / 5)
    assert margin(SCORES, []) == margin([0.0, 0.0, 1.0], [2], ()) == margin([1.0, 2.0], [1]) == 0.0


def test_by_parameters_the_fewest_lowest_layers_that_reach_it():
    sizes = [100] * 10
    assert len(select(SCORES, ratio=0.3, of="parameters", layer_parameters=sizes, total_parameters=1000).removed) == 3
    plan = select(SCORES, ratio=0.31, of="parameters", layer_parameters=sizes, total_parameters=1000)
    assert len(plan.removed) == 4 and plan.parameter_ratio == pytest.approx(0.4)
    plan = select(SCORES, ratio=0.4, layer_parameters=sizes, total_parameters=2000)
    assert plan.layer_ratio == 0.4 and plan.parameter_ratio == pytest.approx(0.2)


def test_auto_folds_into_the_nearest_kept_layer_of_the_same_structure():
    kinds = ["a", "b", "a", "b", "a", "b", "a", "b", "a", "b"]
    plan = select(SCORES, ratio=0.4, merge="auto", structures=kinds)
    assert plan.merge == {} and plan.drop == (1, 3, 5, 7)  # no kept odd layer before 7: dropped
    plan = select([9, 9, 9, 9, 1, 2, 3, 9, 9, 9], count=3, structures=kinds, merge=2)
    assert plan.merge == {5: 3, 6: 2}


def test_by_hand_a_list_folds_into_the_nearest_kept_layer_before():
    plan = Plan(layers=30, drop=[6, 8], merge=[10, 9])
    assert plan.merge == {9: 7, 10: 7} and plan.removed == (6, 8, 9, 10)
    assert Plan(30, merge={10: 2}).donors == {2: (10,)}


def test_round_trip(tmp_path):
    plan = select(SCORES, ratio=0.4, model="abc-def", layer_parameters=[1] * 10, total_parameters=20)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text())["kept"] == list(plan.kept)
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]
    assert "40.0%" in plan.summary() and "20.0% of all parameters" in plan.summary()


BAD = {
    "ratio 0": lambda: select(SCORES, ratio=0.0),
    "ratio 1": lambda: select(SCORES, ratio=1.0),
    "ratio above 1": lambda: select(SCORES, ratio=40),
    "ratio that removes none": lambda: select(SCORES, ratio=0.01),
    "ratio that removes all": lambda: select(SCORES, ratio=0.99),
    "ratio and count": lambda: select(SCORES, ratio=0.4, count=4),
    "neither": lambda: select(SCORES),
    "count 0": lambda: select(SCORES, count=0),
    "count of all": lambda: select(SCORES, count=10),
    "count a float": lambda: select(SCORES, count=2.0),
    "another unit": lambda: select(SCORES, ratio=0.4, of="bytes"),
    "parameters unknown": lambda: select(SCORES, ratio=0.4, of="parameters"),
    "parameters out of reach": lambda: select(
        SCORES, ratio=0.9, of="parameters", layer_parameters=[1] * 10, total_parameters=100
    ),
    "protect unknown": lambda: select(SCORES, ratio=0.4, protect=(10,)),
    "merge more than removed": lambda: select(SCORES, count=2, merge=3),
    "merge a word": lambda: select(SCORES, count=2, merge="all"),
    "NaN score": lambda: select([1.0, float("nan")], count=1),
    "no scores": lambda: select([], count=1),
    "unknown layer": lambda: Plan(30, drop=[30]),
    "negative layer": lambda: Plan(30, drop=[-1]),
    "layer twice": lambda: Plan(30, drop=[3, 3]),
    "layer in both": lambda: Plan(30, drop=[3], merge=[3]),
    "all layers": lambda: Plan(3, drop=[0, 1, 2]),
    "nothing kept before": lambda: Plan(30, drop=[0], merge=[1]),
    "target removed": lambda: Plan(30, drop=[2], merge={3: 2}),
    "target after": lambda: Plan(30, merge={3: 4}),
    "target missing": lambda: Plan(30, merge={3: 31}),
    "no layers": lambda: Plan(0),
    "layers a bool": lambda: Plan(True),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_plans_are_refused(name):
    with pytest.raises(InvalidArgument) as error:
        BAD[name]()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": "gradpruner.plan/1"}', "\x00"])
def test_damaged_plan_files_are_refused(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(CheckpointError):
        Plan.load(tmp_path / "plan.json")
