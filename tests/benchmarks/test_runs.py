"""Benchmarks of whole runs: the pipeline and the curves."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny_llama import NAMES, llama

import gradpruner
from benchmarks.ops.timing import WrongAnswer
from benchmarks.records import read, write
from benchmarks.runs import curves, pipeline
from gradpruner.errors import InvalidArgument

PLAN = gradpruner.Plan(8, drop=[3], merge=[2, 5, 6])


def test_both_merges_of_the_pipeline_agree():
    model = llama(torch.bfloat16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = pipeline.merge_stage(model, 3, 2, plan=PLAN)
    assert [each.implementation for each in found] == ["released", "ours: apply, with its checks", "ours"]
    assert all(each.runs == 2 and each.ratio > 0 for each in found)
    assert found[2].ratio == 1.0
    entries = 8 * 3 * (4 * (24 + 24) + 3 * (24 + 52) - 2 * 12)  # r t (in + out); k and v are 12 high
    assert found[0].importance_bytes == 8 * 4 * entries
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_wrong_merge_stops_the_pipeline(monkeypatch):
    monkeypatch.setattr(pipeline, "_merge_ours", lambda weights, factors, plan: None)
    with pytest.raises(WrongAnswer, match="0 entries changed"):
        pipeline.merge_stage(llama(torch.bfloat16), 3, 1, plan=PLAN)
    monkeypatch.setattr(pipeline, "_merge_ours", lambda weights, *_: weights[4, f"{NAMES[0]}.weight"].mul_(2))
    with pytest.raises(WrongAnswer, match="otherwise than the released way"):
        pipeline.merge_stage(llama(torch.bfloat16), 3, 1, plan=PLAN)


def test_probe_overhead_pairs_steps_with_and_without():
    without, watched = pipeline.probe_overhead(llama(), 2, rows=2, length=8)
    assert (without.implementation, watched.implementation) == ("without", "with the probe")
    assert without.ratio == 1.0 and watched.runs == 2 and watched.ratio_min <= watched.ratio <= watched.ratio_max
    shapes = [(24, 24), (12, 24), (12, 24), (24, 24), (52, 24), (52, 24), (24, 52)]
    stored = sum(min(o * i, 2 * 8 * (o + i)) for o, i in shapes)  # factors of two steps, or F where that is smaller
    assert watched.importance_bytes == 8 * 4 * stored


def test_the_exponent_of_a_power_law():
    assert curves.exponent([1, 2, 4, 8], [3.0, 12.0, 48.0, 192.0]) == pytest.approx(2.0)
    assert curves.exponent([10, 100], [7.0, 7.0]) == pytest.approx(0.0)
    assert math.isnan(curves.exponent([1, 2], [0.0, 1.0])) and math.isnan(curves.exponent([4], [1.0]))
    with pytest.raises(InvalidArgument, match="as many"):
        curves.exponent([1, 2], [1.0])


def test_curves_to_csv_and_plot(tmp_path):
    points = [*curves.curve("factor_merge", "width", (16, 32), 1), *curves.curve("gram_norm", "rank", (2, 4, 8), 1)]
    assert [each.value for each in points] == [16, 32, 2, 4, 8] and min(each.median_s for each in points) > 0
    path = tmp_path / "c.csv"
    points = [replace(each, time_exponent=1.5, memory_exponent=0.5) for each in points]  # nan is not equal to itself
    write(path, points)
    assert read(path, curves.Point) == points
    drawn = curves.plot(path)
    assert drawn.name == "c.svg" and drawn.read_text(encoding="utf-8").startswith("<?xml")
    first, second = curves.table_rows(points)
    assert (first["values"], second["values"]) == ("16 32", "2 4 8") and first["time exponent"] == 1.5


def test_memory_of_the_probe_grows_with_depth():
    # a small model's factors become dense: at least F of every weight is held, 4 (1024 x 256 + 3 x 512 x 256) bytes
    points = curves.curve("probe", "depth", (2, 4), 1)
    assert points[0].extra_bytes > 2 << 20 and points[1].extra_bytes > 1.5 * points[0].extra_bytes
