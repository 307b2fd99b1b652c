"""A probe that ends before its adapters show a gradient is refused before anything is loaded."""

from __future__ import annotations

import json

import pytest

from gradpruner.cli.main import main
from gradpruner.errors import InvalidArgument
from gradpruner.run.job import Job
from gradpruner.training.probe_length import check_probe_length
from gradpruner.training.recipe import Recipe


@pytest.mark.parametrize(
    ("recipe", "steps", "needed"),
    [
        ({"warmup": 0}, 1, 2),
        ({"warmup": 1}, 2, 3),
        ({"warmup": 50}, 2, 3),  # a warm-up may be longer than the probe, whose learning rate is then small
        ({"trainer_arguments": {"lr_scheduler_type": "constant"}}, 1, 2),
    ],
)
def test_the_first_step_with_a_gradient(recipe, steps, needed):
    """The numbers are what probes of tiny models see: below them, no step is usable."""
    with pytest.raises(InvalidArgument, match=f"a probe of {steps} steps with warmup = .* expected {needed} steps"):
        check_probe_length(Recipe(**recipe), steps, 20)
    check_probe_length(Recipe(**recipe), needed, 20)


def test_weights_that_train_themselves_have_a_gradient_at_once():
    check_probe_length(Recipe(rank=0, warmup=5), 1, 20)


def test_a_command_says_so_before_anything_is_loaded(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"a {i}", "category": "d"}) + "\n" for i in range(30)))
    words = ["--model", str(tmp_path / "no-model"), "--data", str(data), "--warmup", "5", "--out", str(tmp_path / "o")]
    assert main(["run", *words, "--steps", "10", "--probe-steps", "2"]) == 2
    assert "a probe of 2 steps with warmup = 5" in capsys.readouterr().err
    assert main(["probe", *words, "--steps", "2"]) == 2
    assert "a probe of 2 steps with warmup = 5" in capsys.readouterr().err
    assert Job("no-model", steps=10, probe_steps=2, recipe=Recipe(warmup=5)).probing == 2
