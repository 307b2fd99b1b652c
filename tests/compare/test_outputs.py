"""What is written of a comparison: CSV files, differences with intervals, and what has failed."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from small_comparisons import LAYERS, PROBE, STEPS, TEST, USED, cell, comparison, lines

from gradpruner.cli.main import main
from gradpruner.compare import outputs
from gradpruner.compare.analysis import DENSE
from gradpruner.compare.cells import finished
from gradpruner.compare.results import read_results


def test_what_is_written(base):
    made, written, _, _ = base
    found = {(c["method"], c["seed"]): c for c in made.finished()}
    for result in read_results(made.folder / "results.csv"):
        cell = found.pop((result.method, result.seed))
        right = [int(c) for c in cell["right"]]
        assert len(right) == len(TEST) == result.examples and set(right) <= {0, 1}
        assert result.exact_match == cell["exact_match"] == sum(right) / len(right)
        assert result.steps == STEPS and result.layers == LAYERS - result.count
        assert result.last_loss == pytest.approx(np.mean(cell["training"]["losses"][-20:]))
        assert result.seconds == cell["seconds_to_cut"] + cell["training_seconds"] > 0
    assert not found
    losses = lines(made.folder / "losses.csv")
    assert len(losses) == 2 * STEPS + 6 * (STEPS - PROBE)
    assert [int(r["step"]) for r in losses if (r["method"], r["seed"]) == ("shortgpt", "1")] == [1, 2, 3, 4, 5]
    assert {r["method"] for r in lines(made.folder / "differences.csv")} == {"drop-last", "shortgpt"}
    page = (made.folder / "report.html").read_text()
    assert all(name in page for name in USED) and not (made.folder / "costs.csv").exists()
    rows = {row["method"]: row for row in written["json"]["rows"]}
    assert rows.keys() == {DENSE, *USED} and str(made.folder / "report.html") in written["line"]
    scores = [c["exact_match"] for c in made.finished() if c["method"] == "shortgpt"]
    assert rows["shortgpt"]["exact match"] == pytest.approx(np.mean(scores)) and rows["shortgpt"]["seeds"] == 2
    assert (rows["shortgpt"]["least"], rows["shortgpt"]["most"]) == (min(scores), max(scores))


def test_differences_by_hand():
    right = {seed: "1101011101110110" * 2 for seed in (0, 1)} | {1: "1111011101010110" * 2}
    theirs = {0: "0101001101100110" * 2, 1: "0100011001110010" * 2}
    cells = [
        *[cell(outputs.OURS, row, seed=seed) for seed, row in right.items()],
        *[cell("laco", row, seed=seed) for seed, row in theirs.items()],
        cell("block", theirs[1], seed=1),  # only one seed of it
        cell("taylor", theirs[1], seed=7),  # none in common
        cell("magnitude", theirs[1], count=3),  # ours is not there
        cell(DENSE, "1" * 32, count=0),
        cell("random", ""),  # text without answers
    ]
    found = outputs._differences(cells)
    assert found.keys() == {("laco", 2), ("block", 2)}

    def mean(rows):
        return [sum(map(int, column)) / len(column) for column in zip(*rows, strict=True)]

    for method, ours, other in [
        ("laco", mean(right.values()), mean(theirs.values())),
        ("block", mean([right[1]]), mean([theirs[1]])),
    ]:
        gaps = [a - b for a, b in zip(ours, other, strict=True)]
        draw = random.Random(11)
        means = sorted(sum(draw.choices(gaps, k=len(gaps))) / len(gaps) for _ in range(4000))
        difference = found[method, 2]
        assert difference.mean == pytest.approx(sum(gaps) / len(gaps))
        assert difference.low == pytest.approx(means[100], abs=0.03)
        assert difference.high == pytest.approx(means[3900], abs=0.03)
        assert difference.low < difference.mean < difference.high


def test_a_comparison_with_a_run_that_diverged_says_so(copied, home, capsys):
    (path,) = [p for p in (copied / "trained").glob("*.json") if p.stem == finished_of(copied, "drop-last")]
    trained = json.loads(path.read_text())
    trained["training"]["losses"] = [2.0] * 3 + [90.0] * 2
    path.write_text(json.dumps(trained))
    found = outputs.write(comparison(home, copied), costs=False)
    assert "the run of drop-last, 2 layers less, seed 0, has diverged: its loss rose from 2 to 90" in found["failed"]
    assert found["json"]["failed"] == [found["failed"]] and found["failed"] in found["line"]
    assert "has diverged" in (copied / "report.html").read_text()
    assert main(["report", str(copied)]) == 0 and "has diverged" in capsys.readouterr().out


def finished_of(folder, method):
    return next(c["trained"] for c in finished(folder) if c["method"] == method and c["seed"] == 0)
