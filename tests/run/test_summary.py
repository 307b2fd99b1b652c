"""The table of a run: what was measured in turns, and what must be known beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gradpruner.run import speeds
from gradpruner.run.speeds import speeds_in_turns
from gradpruner.run.summary import TURNS, comparison, notes, share_of_dense, spread

ROW = dict.fromkeys(
    ("exact_match", "perplexity", "step_seconds", "peak_bytes", "layers", "parameters", "checkpoint_bytes"), 1.0
)


class Model(torch.nn.Module):
    def __init__(self, folder):
        super().__init__()
        self.folder = folder


def test_models_take_turns(monkeypatch):
    """Each is loaded anew and timed once a turn; what slows a stretch of turns down touches both."""
    order = []

    def load(folder):
        order.append(folder)
        return Model(folder), "tokenizer"

    def speed(model, tokenizer, runs):
        assert (tokenizer, runs) == ("tokenizer", 1)
        busy = 0.5 if len(order) in (5, 6) else 1.0  # another process, in the third turn
        return busy * {"/dense": 10.0, "/model": 15.0}[model.folder]

    monkeypatch.setattr(speeds, "generation_speed", speed)
    found = speeds_in_turns({"dense": Path("/dense"), "pruned": Path("/model")}, load, turns=4)
    assert order == ["/dense", "/model"] * 4
    assert found == {"dense": [10.0, 10.0, 5.0, 10.0], "pruned": [15.0, 15.0, 7.5, 15.0]}
    rows = [{**ROW, "name": n, "tokens_per_second": found[n][0], TURNS: found[n]} for n in ("dense", "pruned")]
    (line,) = [line for line in comparison(rows) if line[""] == "generation (tokens/s)"]
    assert line["dense"] == "10.0 (5.0 to 10.0)" and line["pruned"] == "15.0 (7.5 to 15.0)"
    assert line["pruned / dense"] == "150.0% (150.0% to 150.0%)"


def test_the_ratio_is_within_a_turn():
    assert spread([3.0, 1.0, 2.0], "{:.1f}") == "2.0 (1.0 to 3.0)"
    rows = [
        {**ROW, "name": "dense", "tokens_per_second": 10.0, TURNS: [10.0, 20.0, 4.0]},
        {**ROW, "name": "pruned", "tokens_per_second": 12.0, TURNS: [12.0, 30.0, 4.4]},
    ]
    (line,) = [line for line in comparison(rows) if line[""] == "generation (tokens/s)"]
    assert line["pruned / dense"] == "120.0% (110.0% to 150.0%)"
    rows[1]["tokens_per_second"] = 11.0  # of another median; the report shows the ratio of the table
    assert share_of_dense("tokens_per_second", *rows) == pytest.approx(1.2)
    assert share_of_dense("step_seconds", {"step_seconds": 4.0}, {"step_seconds": 3.0}) == 0.75
    assert share_of_dense("step_seconds", {"step_seconds": None}, {"step_seconds": 1.0}) is None
    assert "the models took 3 turns" in notes(rows) and "Training step and peak memory" in notes(rows)
    assert notes(rows[:1]) == ""


@pytest.mark.parametrize("known", [None, 7.0])
def test_a_speed_that_was_not_measured_in_turns(known):
    """Of a run whose models are gone, or of an older one."""
    rows = [{**ROW, "name": name, "tokens_per_second": known} for name in ("dense", "pruned")]
    labels = [line[""] for line in comparison(rows)]
    assert ("generation (tokens/s)" in labels) == (known is not None)
    assert notes(rows).startswith("Training step")
