"""Records of measurements: ratios, CSV files, tables and plots."""

from __future__ import annotations

import csv
import math
from dataclasses import replace

import pytest
from benchmark_results import CPU, some_results

from benchmarks import records
from benchmarks.ops.cases import OPERATIONS, SHAPES
from benchmarks.ops.timing import Measured
from benchmarks.plots import plot
from benchmarks.records import Result, read, results, table_rows, update, write
from gradpruner.errors import CheckpointError, InvalidArgument


def test_ratios_are_taken_round_by_round():
    by_name = {each.implementation: each for each in some_results()}
    released = by_name["released"]
    assert (released.ratio_to_ours, released.ratio_min, released.ratio_max) == (4.0, 3.0, 8.0)
    assert (released.median_s, released.min_s, released.max_s, released.runs) == (6.0, 4.0, 8.0, 3)
    assert by_name["ours"].share_of_limit == 0.5 and by_name["ours"].ratio_to_ours == 1.0
    (row,) = table_rows(some_results())
    assert row["which"] == "in place" and row["best torch"] == "2 s" and row["released"] == "6 s"
    assert row["released / ours"] == "4.00 (3.00 to 8.00)" and row["compile s"] == 30.0


def test_csv_round_trip(tmp_path):
    path = tmp_path / "x.csv"
    write(path, some_results())
    assert read(path, Result) == some_results()
    path.write_text(path.read_text().replace("median_s", "median"))
    with pytest.raises(CheckpointError, match="Result"):
        read(path, Result)
    with pytest.raises(InvalidArgument, match="--csv"):
        read(tmp_path / "none.csv", Result)


def test_files_without_the_newer_columns_can_be_read(tmp_path):
    path = tmp_path / "x.csv"
    found = [replace(each, call_s=0.5) for each in some_results()]
    write(path, found)
    assert read(path, Result) == found
    with path.open(newline="") as file:
        lines = [
            {name: line[name] for name in line if name not in ("call_s", "error")} for line in csv.DictReader(file)
        ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    assert read(path, Result) == some_results()
    update(path, some_results("gram_norm"))
    assert read(path, Result) == [*some_results(), *some_results("gram_norm")]


def test_the_committed_files_can_be_read():
    committed = list(records.FOLDER.glob("*-llama-8b*.csv"))
    assert committed and all(read(each, Result) for each in committed)


def failing_results(failing: str) -> list[Result]:
    case = next(OPERATIONS["threshold"](SHAPES["tiny"]))
    measured = [
        Measured("reference", "reference", (9.0,), 9.0, 4, (9.5,)),
        Measured("in place", "torch", (4.0, 4.0), 2.5, 2, (5.0, 6.0)),
        Measured("topk", "torch", (3.0, 3.0), 2.5, 2, (4.0, 4.0)),
        Measured("ours", "ours", (2.0, 1.0), 1.5, 1, (2.5, 2.5)),
    ]
    measured = [replace(e, seconds=(), calls=(), error="wrong: 0.5") if e.name == failing else e for e in measured]
    return results(case, measured, (0.5, "bytes"), CPU)


@pytest.mark.parametrize("failing", ["ours", "topk", "reference"])
def test_what_failed_is_in_no_ratio_no_plot_and_no_best(tmp_path, failing):
    found = failing_results(failing)
    (row,) = table_rows(found)
    assert row["failed"] == f"{failing}: wrong: 0.5"
    assert (row["which"], row["best torch, call"]) == (("in place", "5.5 s") if failing == "topk" else ("topk", "4 s"))
    ours = [row[name] for name in ("ours", "ours, call", "ours of limit", "best torch / ours")]
    assert ours[0] == ("" if failing == "ours" else "1.5 s") and len({not each for each in ours}) == 1
    assert row["reference"] == ("" if failing == "reference" else "9 s (once)")
    path = tmp_path / "x.csv"
    write(path, found)
    bad = next(each for each in read(path, Result) if each.implementation == failing)
    assert bad.error == "wrong: 0.5" and bad.runs == 0 and bad.call_s is None
    assert all(math.isnan(each) for each in (bad.median_s, bad.min_s, bad.max_s, bad.ratio_to_ours, bad.share_of_limit))
    drawn = plot(path)[0].read_bytes()
    write(path, [each for each in found if not each.error])
    assert plot(path)[0].read_bytes() == drawn


def test_a_second_run_replaces_its_rows_and_keeps_the_others(tmp_path):
    path = tmp_path / "x.csv"
    update(path, some_results("threshold"))
    update(path, some_results("gram_norm"))
    again = [replace(each, median_s=7.0) for each in some_results("threshold")]
    update(path, again)
    assert read(path, Result) == [*some_results("gram_norm"), *again]
    elsewhere = [replace(each, threads=77) for each in some_results("gram_norm")]
    update(path, elsewhere)
    assert read(path, Result) == elsewhere


@pytest.mark.slow
@pytest.mark.in_ci
def test_plots_come_from_the_csv(tmp_path):
    path = tmp_path / "x.csv"
    write(path, [*some_results("threshold"), *some_results("sign_merge_")])
    drawn = plot(path)
    assert [each.name for each in drawn] == ["x-threshold.svg", "x-sign_merge.svg"]
    assert all(each.read_text(encoding="utf-8").startswith("<?xml") for each in drawn)
    before = drawn[0].read_bytes()
    assert plot(path)[0].read_bytes() == before
    write(path, [replace(each, median_s=100.0 * each.median_s) for each in some_results("threshold")])
    assert plot(path)[0].read_bytes() != before
