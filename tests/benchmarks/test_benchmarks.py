"""The command `python -m benchmarks`."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import records
from benchmarks.__main__ import main
from benchmarks.records import Result, read


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "FOLDER", tmp_path / "results")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = "x threshold --shapes tiny --repeats 2 --skip compiled --also wrong_implementations:Mine --csv --plot"
    monkeypatch.setattr(sys, "argv", words.split())
    assert main() == 0
    out = capsys.readouterr().out
    assert "4 an entry" in out and "mine" in out and "of limit" in out
    (path,) = (tmp_path / "results").glob("*-tiny.csv")
    found = read(path, Result)
    assert len({each.row for each in found}) == 4 and {each.implementation for each in found} >= {"mine", "ours"}
    assert all(each.runs == (1 if each.kind == "reference" else 2) for each in found)


@pytest.mark.slow
@pytest.mark.in_ci
def test_the_command_goes_on_after_a_failure_and_ends_with_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = "x threshold gram_norm --shapes tiny --repeats 1 --skip compiled --also wrong_implementations:OwnSums"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--also", "wrong_implementations:Raising", "--csv"])
    assert main() == 1
    out, err = capsys.readouterr()
    assert "wrong: wrong: the threshold is off by" in out and "\ngram_norm\n" in out
    assert "benchmarks: threshold at 48x48, top 20 %: 'wrong': wrong: the threshold is off by" in err
    assert "benchmarks: threshold at 16x48, top 20 %: 'raising': RuntimeError: at 7:3: ... K >= 16" in err
    assert "benchmarks: gram_norm at 14 pairs, r=64: 'wrong': wrong: a norm is off by" in err
    (path,) = tmp_path.glob("*-tiny.csv")
    found = read(path, Result)
    assert {each.implementation for each in found if each.error} == {"wrong", "raising"}
    assert all(each.median_s > 0 for each in found if not each.error)
    assert {each.op for each in found} == {"threshold", "gram_norm"}


def test_a_budget_leaves_rows_out_and_says_which(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = "x gram_norm threshold --shapes tiny --repeats 1 --skip compiled --budget 1e-9"
    monkeypatch.setattr(sys, "argv", words.split())
    assert main() == 0
    out = capsys.readouterr().out
    assert "not run" in out and "gram_norm at 14 pairs, r=8" in out and "threshold at 80x48, top 20 %" in out
    monkeypatch.setattr(sys, "argv", [*words.split()[:-1], "0"])
    with pytest.raises(SystemExit, match="2"):
        main()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--skip ours", "skip = 'ours'; accepted are released"),
        ("--also nowhere:Nothing", "expected package.module:Class"),
        ("--also gradpruner:Plan", "expected a subclass of Implementation"),
        ("--also benchmarks.ops.released:Released", "a name is taken twice"),
        pytest.param(
            "--device cuda", "torch sees no GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")
        ),
    ],
)
def test_wrong_calls(monkeypatch, capsys, words, message):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", ["x", *words.split()])
    assert main() == 1
    assert message in capsys.readouterr().err
