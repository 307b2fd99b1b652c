"""Tasks of lm-evaluation-harness in a run and in a comparison: scored once, in the results, the tables and the page."""

from __future__ import annotations

import json

import pytest
from local_tasks import write_tasks
from small_runs import STEPS, TEST, TRAIN, job_of, run, write_model

from gradpruner.compare.experiment import Compare
from gradpruner.compare.outputs import write
from gradpruner.compare.settings_file import COMPARISON_SETTINGS
from gradpruner.compare.task_scores import task_lines, task_note, task_rows
from gradpruner.errors import InvalidArgument
from gradpruner.run.job import Job
from gradpruner.training.harness import Harness


def cell(seed: int, value: float, method: str = "gradpruner", count: int = 2) -> dict:
    metric = {"name": "acc", "filter": "none", "value": value, "stderr": 0.1, "higher_is_better": True}
    task = {"version": 1, "num_fewshot": 0, "samples": 12, "of": 12, "metrics": [metric]}
    found = {"tasks": {"letters": task}, "settings": {"limit": None}, "lm_eval": "0.4", "truncated": 0}
    return {"method": method, "count": count, "seed": seed, "harness": found}


def test_values_of_several_seeds_are_averaged():
    cells = [cell(0, 0.75, "dense", 0), cell(0, 0.5), cell(1, 0.25), {"method": "block", "count": 2, "seed": 0}]
    assert task_rows(cells) == [
        {"method": "dense", "layers removed": 0, "letters\nacc": "0.750 ± 0.100", "seeds": 1},
        {"method": "gradpruner", "layers removed": 2, "letters\nacc": "0.375 ± 0.177", "seeds": 2},
    ]
    assert "standard deviation over the seeds" in task_note(cells) and task_note([]) == ""
    assert task_lines(cells)[1] == ("gradpruner", 2, 0, "letters", "acc", "none", 0.5, 0.1, 0, 12)


def test_tasks_do_not_change_what_a_run_makes():
    with_tasks = Job("model", 10, harness=Harness(("arc_easy",)))
    assert with_tasks.to_dict() == Job("model", 10).to_dict()


def test_scores_belong_to_the_content_of_the_task_files(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0.4.9")
    tasks = Harness(("letters",), folder=write_tasks(tmp_path))
    before = tasks.identity()
    assert before == tasks.identity() and before["lm_eval"] == "0.4.9"
    rows = tmp_path / "letters.jsonl"
    rows.write_text(rows.read_text().replace("word 1", "word 2"))
    assert tasks.identity() != before
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0.4.10")
    assert Harness(("letters",)).identity()["lm_eval"] == "0.4.10"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    pytest.importorskip("lm_eval", reason="needs the extra harness: lm-eval")
    folder = tmp_path_factory.mktemp("tasks")
    write_model(folder / "model")
    write_tasks(folder / "tasks")
    return folder


@pytest.mark.slow
def test_a_run_scores_both_models_once(home, monkeypatch):
    source, folder = str(home / "model"), home / "run"
    run(source, folder).everything()
    tasks = Harness(("letters",), folder=str(home / "tasks"))
    results = run(source, folder, harness=tasks).everything()  # added to a run that was finished without
    assert results["harness"].keys() == {"dense", "pruned"}
    assert results["harness"]["pruned"]["tasks"]["letters"]["samples"] == 12
    page = (folder / "report.html").read_text()
    assert "Tasks of lm-evaluation-harness" in page and "letters" in page
    scored: list[object] = []
    real = Harness.evaluate
    monkeypatch.setattr(Harness, "evaluate", lambda *a, **k: scored.append(a) or real(*a, **k))
    assert run(source, folder, harness=tasks).everything()["harness"] == results["harness"] and not scored
    other = Harness(("letters",), folder=str(home / "tasks"), limit=3)
    assert run(source, folder, harness=other).everything()["harness"] != results["harness"] and len(scored) == 2


@pytest.mark.slow
def test_a_comparison_scores_every_model_and_keeps_to_its_tasks(home):
    tasks = Harness(("letters", "passages"), folder=str(home / "tasks"))

    def compare(harness):
        job = job_of(str(home / "model"), harness=harness, steps=STEPS)
        return Compare(job, TRAIN, TEST, home / "comparison", methods=["drop-last"], ratios=[0.5], held_out=4)

    comparison = compare(tasks)
    comparison.work()
    found = write(comparison, costs=False)
    assert [row["method"] for row in found["json"]["tasks"]] == ["dense", "drop-last"]
    assert "word_perplexity" in found["line"] and "Tasks of lm" in (home / "comparison/report.html").read_text()
    assert len((home / "comparison/tasks.csv").read_text().splitlines()) == 5
    terms = json.loads((home / "comparison" / COMPARISON_SETTINGS).read_text())
    assert terms["harness"]["tasks"] == ["letters", "passages"]
    with pytest.raises(InvalidArgument, match="harness"):
        compare(None)
