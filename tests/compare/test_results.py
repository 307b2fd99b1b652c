"""CSV files of results and costs: written, read, and refused when damaged."""

from __future__ import annotations

import math
import re

import pytest
from comparison_pages import COSTS, make_data, result

from gradpruner.compare.results import read_costs, read_results, write_costs, write_results
from gradpruner.errors import CheckpointError, InvalidArgument


def test_csv_round_trip(tmp_path):
    results = make_data()["results"] + [result("gradpruner:merge=0", 4, 0, None, merged='6>5,"', last_loss=math.inf)]
    write_results(tmp_path / "results.csv", results)
    assert read_results(tmp_path / "results.csv") == results
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert lines[0].startswith("method,count,ratio,seed,exact_match") and len(lines) == len(results) + 1
    assert lines[-1].startswith("gradpruner:merge=0,4,0.4,0,,,,200,")
    write_costs(tmp_path / "costs.csv", COSTS)
    assert read_costs(tmp_path / "costs.csv") == COSTS
    write_results(tmp_path / "results.csv", [])
    assert read_results(tmp_path / "results.csv") == []


HEAD = (
    "layers,count,train_step_seconds,train_peak_bytes,generate_seconds,generate_peak_bytes,checkpoint_bytes,train_flops"
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "expected the columns layers,count"),
        (b"layers,count\n1,2\n", "expected the columns layers,count"),
        (f"{HEAD}\n1,2\n".encode(), "row 2: 2 cells; expected 8"),
        (f"{HEAD}\n1,2,x,4,5,6,7,8\n".encode(), "row 2: train_step_seconds = 'x'; expected float"),
        (f"{HEAD}\n1,2,3,,5,6,7,8\n".encode(), "row 2: train_peak_bytes = ''; expected int"),
        (b"\xff\xfe", "is not a costs file"),
    ],
)
def test_bad_csv(tmp_path, content, words):
    (tmp_path / "costs.csv").write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(words)) as caught:
        read_costs(tmp_path / "costs.csv")
    assert "costs.csv" in str(caught.value)


def test_missing_csv(tmp_path):
    with pytest.raises(InvalidArgument, match=r"gone\.csv.*No such file"):
        read_results(tmp_path / "gone.csv")
