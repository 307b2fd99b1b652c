"""The commands `compare` and `sensitivity` on a tiny model."""

from __future__ import annotations

import json

import pytest
from small_comparisons import BATCH, KIND, OTHER, PROBE, STEPS, make_home

from gradpruner.cli.main import main
from gradpruner.compare.experiment import DENSE


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


def command(home, out, *more, name="compare"):
    return [
        name,
        "--model",
        str(home / "model"),
        "--data",
        str(home / "data.jsonl"),
        "--steps",
        str(STEPS),
        "--probe-steps",
        str(PROBE),
        "--batch-size",
        str(BATCH),
        "--lr",
        "1e-2",
        "--rank",
        "4",
        "--test-limit",
        "6",
        "--held-out",
        "0.2",
        "--out",
        str(out),
        *more,
    ]


def only(home):
    """Enough training examples for the 48 that are held out for methods."""
    rows = [json.dumps({"text": f"word {i}:", "label": "abc"[i % 3]}) for i in range(100)]
    (home / "data.jsonl").write_text("\n".join(rows))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "shortest"], "method = 'shortest'; accepted are"),
        (["--methods", "laco:combine=1"], "combine = 1"),
        (["--methods", "drop-last", "--ratios", "1.5"], "ratio = 1.5; accepted is a share above 0 and below 1"),
        (["--methods", "drop-last", "--ratios", "0.4", "0.01"], "rounds to none"),
        (["--methods", "drop-last", "--ratios", "0.01", "--processes", "2"], "rounds to none"),
        (["--methods", "gradpruner:probe_steps=8"], "8 steps to probe of 8"),
        (["--methods", "gradpruner:preset=best"], "preset = 'best'"),
    ],
)
def test_wrong_commands(home, tmp_path, capsys, more, message):
    only(home)
    assert main(command(home, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out" / "cells").exists()


def test_the_command(home, tmp_path, capsys):
    only(home)
    call = command(home, tmp_path / "out", "--methods", "drop-last", "--ratios", "0.34", "--no-costs")
    assert main(call) == 0
    printed = capsys.readouterr()
    assert "drop-last" in printed.out and "report.html" in printed.out
    assert "drop-last, 2 layers less, seed 0: 5 steps" in printed.err
    assert main([*call, "--json"]) == 0
    again = capsys.readouterr()
    found = json.loads(again.out)
    rows = [(r["method"], r["layers removed"], r["seeds"]) for r in found["rows"]]
    assert rows == [(DENSE, 0, 1), ("drop-last", 2, 1)]
    assert "steps" not in again.err
    assert main([*call, "--max-length", "64"]) == 2
    assert "another max_length" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.in_ci
def test_the_command_sensitivity(home, tmp_path, capsys):
    only(home)
    values = [
        "--probe-steps-values",
        "--kind-values",
        KIND,
        OTHER,
        "--merge-values",
        "1",
        "--top-values",
        "--rank-values",
        "--rank-factor-values",
        "--share-values",
    ]
    call = command(home, tmp_path / "out", *values, "--json", name="sensitivity")
    assert main(call) == 0
    found = json.loads(capsys.readouterr().out)
    assert {r["method"] for r in found["rows"]} == {
        DENSE,
        "gradpruner",
        f"gradpruner:kind={OTHER}",
        "gradpruner:merge=1",
    }
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"layer score {KIND} (default)" in page and f"layer score {OTHER}" in page and "layers merged 1" in page
    assert f"gradpruner:kind={OTHER}" not in page and "gradpruner:merge=1" not in page  # in a plot of their own
    without = [*call, "--kind-values", OTHER, "--merge-values"]
    without[without.index("--out") + 1] = str(tmp_path / "other")
    assert main(without) == 0  # no default to show: then what was tried is shown as methods
    assert f"gradpruner:kind={OTHER}" in (tmp_path / "other" / "report.html").read_text()
