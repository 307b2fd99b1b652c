"""Scores of lm-evaluation-harness: settings, refusals, and the numbers that the package itself finds."""

from __future__ import annotations

import json
import random
import sys

import pytest
import torch
from local_tasks import write_tasks
from small_runs import write_model

from gradpruner.cli import main
from gradpruner.errors import InvalidArgument
from gradpruner.model.load import load_model
from gradpruner.training.harness import Harness, _manager, harness_note, harness_rows

METRIC = {"name": "acc", "filter": "none", "value": 0.5, "stderr": 0.125, "higher_is_better": True}
FOUND = {
    "tasks": {"letters": {"version": 1.0, "num_fewshot": 0, "samples": 4, "of": 12, "metrics": [METRIC]}},
    "settings": {"limit": 4},
    "lm_eval": "0.4",
    "truncated": 2,
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ()}, "expected names of tasks"),
        ({"tasks": "arc_easy"}, "expected names of tasks"),
        ({"tasks": ("",)}, "expected names of tasks"),
        ({"num_fewshot": -1}, "num_fewshot = -1"),
        ({"limit": 0}, "limit = 0"),
        ({"limit": 2.5}, "limit = 2.5"),
        ({"folder": "nowhere"}, "holds no .yaml file"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(InvalidArgument, match=message):
        Harness(**{"tasks": ("arc_easy",), **options})


def test_a_table_has_a_column_for_each_model():
    better = {**FOUND, "tasks": {"letters": {**FOUND["tasks"]["letters"], "metrics": [{**METRIC, "value": 0.75}]}}}
    found = {"dense": better, "pruned": FOUND}
    row = {"task": "letters", "metric": "acc", "better": "higher", "shots": 0, "examples": 4}
    assert harness_rows(found) == [{**row, "dense": "0.750 ± 0.125", "pruned": "0.500 ± 0.125"}]
    assert "Only a part of each task" in harness_note(found) and "pruned: inputs longer" in harness_note(found)


def test_a_missing_package_is_refused_before_the_model_is_looked_for(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    _manager.cache_clear()
    assert main(["evaluate", "--model", "no/such/model", "--tasks", "arc_easy"]) == 2
    assert "pip install gradpruner[harness]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "neither --data nor --tasks"),
        (["--tasks-limit", "3"], "--tasks-limit belongs to --tasks"),
        (["--tasks", "letters", "--window", "8"], "--data, which is not given"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(Harness, "check", lambda self: None)
    assert main(["evaluate", "--model", "no/such/model", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    pytest.importorskip("lm_eval", reason="needs the extra harness: lm-eval")
    folder = tmp_path_factory.mktemp("harness")
    write_model(folder / "model")
    write_tasks(folder / "tasks")
    return folder


@pytest.mark.slow
def test_the_scores_are_those_of_the_package_alone(home):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    model, tokenizer = load_model(home / "model", dtype="float32")
    model.train()
    random.seed(5)
    torch.manual_seed(5)
    before = random.getstate(), torch.get_rng_state()
    names = ("letters", "passages")
    found = Harness(names, folder=str(home / "tasks"), num_fewshot=2).evaluate(model, tokenizer, batch_size=4)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert model.training and found["truncated"] == 0
    theirs = simple_evaluate(
        "hf",
        model_args={"pretrained": str(home / "model"), "dtype": "float32"},
        tasks=list(names),
        num_fewshot=2,
        device="cpu",
        batch_size=1,
        task_manager=TaskManager(include_path=str(home / "tasks"), include_defaults=False),
    )["results"]
    (accuracy,), (perplexity,) = (found["tasks"][name]["metrics"] for name in names)
    assert accuracy["value"] == theirs["letters"]["acc,none"]
    assert accuracy["stderr"] == pytest.approx(theirs["letters"]["acc_stderr,none"])
    assert perplexity["value"] == pytest.approx(theirs["passages"]["word_perplexity,none"], rel=1e-5)
    assert perplexity["stderr"] is None and perplexity["higher_is_better"] is False
    assert found["tasks"]["letters"]["num_fewshot"] == 2 and found["tasks"]["letters"]["samples"] == 12


@pytest.mark.slow
def test_the_command_says_what_was_scored(home, capsys):
    own = ["--tasks-folder", str(home / "tasks"), "--tasks-limit", "5"]
    arguments = ["evaluate", "--model", str(home / "model"), "--tasks", "letters,passages", *own]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "letters" in shown and "word_perplexity" in shown and "Only a part" in shown
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["harness"]
    assert result["tasks"]["letters"]["samples"] == 5 and result["tasks"]["letters"]["of"] == 12
    assert result["settings"]["limit"] == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "message"), [("leters", "similar: letters"), ("arc_easy", "cannot load them or their data")]
)
def test_what_cannot_be_run_is_refused_before_the_model_is_looked_for(home, task, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    own = ["--tasks-folder", str(home / "tasks")]
    assert main(["evaluate", "--model", "no/such/model", "--tasks", f"letters,{task}", *own]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_chat_template_that_is_missing_is_refused(home):
    model, tokenizer = load_model(home / "model")
    with pytest.raises(InvalidArgument, match="no chat template"):
        harness = Harness(("letters",), folder=str(home / "tasks"), apply_chat_template=True)
        harness.evaluate(model, tokenizer, batch_size=4)


@pytest.mark.slow
def test_inputs_that_were_cut_are_counted(home):
    model, tokenizer = load_model(home / "model")
    harness = Harness(("letters",), folder=str(home / "tasks"), num_fewshot=11, limit=3)
    assert harness.evaluate(model, tokenizer, batch_size=2)["truncated"] > 0


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidArgument, match="run in one process"):
        Harness(("arc_easy",)).check()
