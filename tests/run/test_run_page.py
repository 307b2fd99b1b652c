"""The page of a run, from results as a run writes them: no model is trained."""

from __future__ import annotations

import json
import re

import pytest

from gradpruner.errors import InvalidArgument
from gradpruner.plan import Plan
from gradpruner.run.page import write_report
from gradpruner.run.summary import outcome

PLAN = Plan(6, drop=[2, 4], merge={3: 1}, kind="norm")
ROW = {
    "name": "dense",
    "layers": 6,
    "parameters": 1000,
    "exact_match": 0.8,
    "perplexity": 2.0,
    "step_seconds": 2.0,
    "peak_bytes": 1000,
    "checkpoint_bytes": 1000,
    "tokens_per_second": 10.0,
    "failed": None,
    "training": {"losses": [2.0, 1.5, 1.2, 1.0]},
}
PRUNED = {
    **ROW,
    "name": "pruned",
    "layers": 3,
    "parameters": 600,
    "exact_match": 0.76,
    "step_seconds": 1.3,
    "training": {"losses": [1.8, 1.1]},
}
PROBE = {"steps": 2, "skipped": 0, "margin": 0.4, "stability": [0.5, 1.0], "layer_scores": [6.0, 5, 1, 3, 2, 4]}
SETTINGS = {
    "source": "owner/dense",
    "steps": 4,
    "probe_steps": 2,
    "recipe": {"batch_size": 2, "accumulation": 3},
    "preset": "default",
    "train_examples": 30,
    "test_examples": 6,
    "data": "abc",
}


def page_of(folder, rows=(ROW, PRUNED), settings=SETTINGS, **changes):
    results = {"rows": list(rows), "plan": PLAN.to_dict(), "probe": PROBE, **changes}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "run.json").write_text(json.dumps(settings))
    assert write_report(folder) == folder / "report.html"
    return (folder / "report.html").read_text()


def test_accuracy_comes_first(tmp_path):
    page = page_of(tmp_path)
    sentence = (
        "The pruned model keeps 0.760 of 0.800 exact match (−5.0 %) with 3 of 6 decoder layers removed; "
        "a training step takes 0.65 of the dense model&#39;s time."
    )
    assert page.index(sentence) < page.index("<dl") < page.index("Which layers are removed")
    assert re.search(r"exact match</dt><dd>0\.760<small>dense 0\.800", page)
    assert "owner/dense, 30 training and 6 test examples, 4 steps of 6" in page
    assert not re.search(r"https?:|src=\"(?!data:)|<script|<link", page)


def test_what_became_of_each_layer_is_seen_and_heard(tmp_path):
    page = page_of(tmp_path)
    strip = page[page.index('<ol class="strip"') : page.index("</ol>")]
    fates = ["protected", "kept", "dropped", "merged", "dropped", "kept"]
    assert re.findall(r'class="box (\w+)"', strip) == fates
    words = re.findall(r'class="hidden">layer (\d): (\w+)', strip)
    assert words == [(str(n), "kept" if fate == "protected" else fate) for n, fate in enumerate(fates)]
    legend = page[page.index('<ul class="legend"') : page.index("</ul>")]
    assert re.findall(r'class="box (\w+)"', legend) == ["kept", "protected", "dropped", "merged"]


def test_losses_are_drawn_with_the_cut(tmp_path):
    page = page_of(tmp_path)
    assert "The cut is after step 2. At the last step: dense 1, pruned 1.1." in page
    assert page.count("data:image/png;base64,") == 2


def test_an_older_folder_has_a_page_without_losses(tmp_path):
    rows = [{name: value for name, value in row.items() if name != "training"} for row in (ROW, PRUNED)]
    page = page_of(tmp_path, rows, {"source": "m", "steps": 4, "probe_steps": 2})
    assert "<h2>Training</h2>" not in page and page.count("data:image/png;base64,") == 1


def test_a_run_that_failed_says_so(tmp_path):
    page = page_of(tmp_path, [{**PRUNED, "failed": "the pruned run has diverged <b>"}])
    assert "This run is no success." in page and "the pruned run has diverged &lt;b&gt;" in page
    assert "The pruned model reaches 0.760 exact match with 3 of 6 decoder layers removed." in page


def test_without_results(tmp_path):
    with pytest.raises(InvalidArgument):
        write_report(tmp_path)


def test_the_sentence_of_other_cases():
    text = [{**row, "exact_match": None} for row in (ROW, {**PRUNED, "perplexity": 2.2})]
    assert outcome(text, PLAN).startswith(
        "The pruned model reaches 2.20 perplexity, the dense model 2.00 (+10.0 %), with 3 of 6 decoder layers removed"
    )
    better = [{**ROW, "exact_match": 0.5}, PRUNED]
    assert "reaches 0.760 exact match, the dense model 0.500 (+52.0 %)" in outcome(better, PLAN)
    assert "was not scored" in outcome([{**PRUNED, "exact_match": None, "perplexity": None}], PLAN)


def scores_of(accuracy: float, *, limit: int | None = None, truncated: int = 0) -> dict:
    """What `Harness.evaluate` returns."""
    metrics = [
        {"name": "acc", "filter": "none", "value": accuracy, "stderr": 0.02, "higher_is_better": True},
        {"name": "exact<match", "filter": "strict", "value": 3.0, "stderr": None, "higher_is_better": False},
    ]
    task = {"version": 1, "num_fewshot": 5, "samples": 12, "of": 12, "metrics": metrics}
    return {"tasks": {"letters": task}, "settings": {"limit": limit}, "lm_eval": "0.4.13", "truncated": truncated}


def test_tasks_of_the_harness_have_a_table_of_both_models(tmp_path):
    harness = {"dense": scores_of(0.75, limit=3), "pruned": scores_of(0.5, limit=3, truncated=2)}
    page = page_of(tmp_path, harness=harness)
    section = page[page.index("Tasks of lm-evaluation-harness") :]
    first, second = re.findall(r"<tr>(.*?)</tr>", section[: section.index("</table>")], re.DOTALL)[1:]
    cells = [re.sub(r"\s*<.*?>\s*", "|", row).strip("|").replace("||", "|").split("|") for row in (first, second)]
    assert cells[0] == ["letters", "acc", "higher", "5", "12", "0.750 ± 0.020", "0.500 ± 0.020"]
    assert cells[1] == ["letters", "exact&lt;match, strict", "lower", "5", "12", "3.000", "3.000"]
    assert "lm-evaluation-harness 0.4.13; ± is its standard error" in section
    assert "so these are no scores to publish" in section
    assert "pruned: inputs longer than the model can read were cut (2 warnings)" in section
    assert "dense: inputs longer" not in section
