"""ratio = "auto": which cuts are tried, which is taken, and what a run with it does and leaves behind."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from auto_runs import EXAMPLES, make_source, run
from margins import margin_at
from transformers import AutoModelForCausalLM
from word_tokenizers import make_tokenizer

from gradpruner.cli.main import main
from gradpruner.data.examples import Example
from gradpruner.data.load import load_examples
from gradpruner.data.table import Examples
from gradpruner.errors import GradPrunerError, InvalidArgument
from gradpruner.model.load import Loaded
from gradpruner.probe.igia import Igia
from gradpruner.run import models, stages
from gradpruner.run import trainings as pipeline
from gradpruner.run.auto_ratio import Trial, choose, hold_out, search
from gradpruner.run.job import Job
from gradpruner.run.models import RunModels
from gradpruner.training.evaluate import Evaluation


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("auto"))


def trial(count, lost):
    return Trial(count, None, 1.0, lost, 0.0)


@pytest.mark.parametrize("size", range(1, 6))
def test_the_search_takes_the_largest_count_within_the_bound(size):
    counts = [3 * n + 2 for n in range(size)]
    for passes in itertools.product((True, False), repeat=size):
        asked = []

        def trial_of(count, passes=passes, asked=asked):
            asked.append(count)
            return trial(count, 0.05 if passes[counts.index(count)] else 0.5)

        try:
            best, trials = search(counts, trial_of, 0.05)
        except InvalidArgument as error:
            assert not passes[0] and counts[0] in asked
            assert "max_lost = 0.05" in str(error) and "50.0%" in str(error)
        else:
            index = counts.index(best.count)
            assert passes[index] and [t.count for t in trials] == sorted(asked)
            assert index == size - 1 or (counts[index + 1] in asked and not passes[index + 1])
            prefix = next((i for i, ok in enumerate(passes) if not ok), size)
            if not any(passes[prefix:]):  # what is lost grows with the count
                assert index == prefix - 1
        assert len(asked) == len(set(asked)) <= math.ceil(math.log2(size)) + 1


def test_a_failed_search_names_the_least_that_was_lost():
    lost = {2: 0.3, 4: 0.2, 6: 0.4}
    with pytest.raises(InvalidArgument, match=r"at least 20.0% \(removing 4\); raise max_lost"):
        search([2, 4, 6], lambda count: trial(count, lost[count]), 0.1)


class Checks:
    """Checks by count, made up, and which were asked for."""

    def __init__(self, **results):
        self.results = {int(name[1:]): result for name, result in results.items()}
        self.asked = []

    def __call__(self, count):
        self.asked.append(count)
        exact, perplexity = self.results[count]
        return Evaluation(exact, perplexity, None, 50)


def choose_of(checks, folder, bound, **more):
    return choose([9.0, 1.0, 2.0, 3.0, 4.0, 5.0], checks, folder / "auto.json", bound=bound, steps=7, **more)


def test_exact_match_decides_and_the_reason_says_why(tmp_path):
    checks = Checks(n0=(1.0, 2.0), n1=(1.0, 2.0), n2=(0.99, 9.0), n3=(0.9, 2.0))
    choice = choose_of(checks, tmp_path, 0.01)
    assert choice.count == 2  # 1 - 0.99 is more than 0.01 in floating point
    assert checks.asked == [0, 2, 3] and choice.spent == 21
    assert [(t.count, t.exact_match, t.lost) for t in choice.trials] == [(2, 0.99, 0.01), (3, 0.9, 0.1)]
    for part in (
        "2 of 6 layers",
        "candidates 1, 2, 3 ",
        "at most 1.0%",
        "exact match (one example is 2.0%)",
        "50 held-out examples after 7 training steps: 1.0% lost (3: 10.0% lost)",
        "took 21 steps beyond",
    ):
        assert part in choice.reason, (part, choice.reason)
    stored = json.loads((tmp_path / "auto.json").read_text())
    assert stored == {**json.loads(json.dumps(choice.to_dict())), "checked": stored["checked"]}
    assert stored["reason"] == choice.reason and set(stored["checked"]) == {"0", "2", "3"}


def test_perplexity_decides_where_exact_match_cannot_tell(tmp_path):
    for name, exact, why in (("none right", 0.0, "the dense model's is 0"), ("plain text", None, "no answers")):
        (tmp_path / name).mkdir()
        checks = Checks(n0=(exact, 2.0), n1=(exact, 2.0), n2=(exact, 2.5), n3=(exact, 1.0))
        choice = choose_of(checks, tmp_path / name, 0.19)
        assert choice.count == 1 and choice.dense["perplexity"] == 2.0
        assert [t.lost for t in choice.trials] == [0.0, 0.2]
        assert "1 / perplexity" in choice.reason and why in choice.reason and "nothing lost (2: 20.0%" in choice.reason


def test_a_cut_that_breaks_the_model_loses_all_and_a_broken_dense_model_is_an_error(tmp_path):
    for name, broken in (("infinite", math.inf), ("none", math.nan)):
        (tmp_path / name).mkdir()
        checks = Checks(n0=(None, 2.0), n1=(None, 2.0), n2=(None, broken))
        assert [t.lost for t in choose_of(checks, tmp_path / name, 0.5).trials] == [0.0, 1.0]
        with pytest.raises(GradPrunerError, match="dense model's 1 / perplexity"):
            choose_of(Checks(n0=(None, broken)), tmp_path, 0.5)
        (tmp_path / "auto.json").unlink()


def test_what_was_checked_is_not_checked_again(tmp_path):
    checks = Checks(n0=(1.0, 2.0), n1=(0.8, 2.0), n2=(0.7, 2.0), n3=(0.6, 2.0))
    with pytest.raises(InvalidArgument, match=r"at least 20.0% \(removing 1\)"):
        choose_of(checks, tmp_path, 0.1)
    assert checks.asked == [0, 2, 1]
    assert choose_of(checks, tmp_path, 0.2).count == 1 and checks.asked == [0, 2, 1]
    choice = choose_of(checks, tmp_path, 0.5)
    assert choice.count == 3 and checks.asked == [0, 2, 1, 3] and choice.spent == 28


def test_what_is_held_out_goes_with_its_copies():
    examples = [n % 40 for n in range(100)]
    rest, held = hold_out(examples, 7, seed=3)
    assert len(set(held)) == len(held) == 7 and set(rest) == set(range(40)) - set(held)
    assert rest == [n for n in examples if n not in held]
    assert hold_out(examples, 7, seed=3) == (rest, held) != hold_out(examples, 7, seed=4)
    answers = [Example(f"q{n}", "a") for n in examples]
    rest_of, held_of = hold_out(answers, 7, seed=3)
    assert [[int(e.prompt[1:]) for e in part] for part in (rest_of, held_of)] == [rest, held]
    sizes = [len(hold_out(range(n), None, 0)[1]) for n in (2, 40, 57, 5000)]
    assert sizes == [1, 4, 5, 200]
    for rows, of in ((0, 5), (5, 5), (None, 1)):
        with pytest.raises(InvalidArgument, match=f"check_rows = .* of {of} different"):
            hold_out([1] * 9 + list(range(of)) if of > 1 else [1] * 9, rows, 0)


def test_what_is_held_out_of_a_table_stays_on_disk(tmp_path):
    """The examples may be more than the memory holds."""
    rows = [{"messages": [{"role": r, "content": str(n % 20)} for r in ("user", "assistant")]} for n in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = load_examples(tmp_path / "a.jsonl")
    rest, held = hold_out(table, 5, seed=3)
    assert isinstance(rest, Examples) and isinstance(held, Examples)
    assert (rest, held) == hold_out(list(table), 5, seed=3) and not set(rest) & set(held)


class Watched:
    """What the pipeline trains on and scores. exact: by layers left, made up; None: as it is."""

    def __init__(self, monkeypatch, exact=None):
        self.trained, self.scored, self.stop_at = [], [], None
        train, measure = stages.train, models.measure

        def watched_train(model, ordered, *args, **options):
            if len(self.trained) == self.stop_at:
                raise KeyboardInterrupt
            self.trained.append((model.config.num_hidden_layers, [row["input_ids"] for row in ordered]))
            return train(model, ordered, *args, **options)

        def watched_measure(model, tokenizer, examples, **options):
            layers = model.config.num_hidden_layers
            self.scored.append((layers, list(examples)))
            if exact is None:
                return measure(model, tokenizer, examples, **options)
            return Evaluation(exact[layers], 2.0, None, len(examples))

        monkeypatch.setattr(stages, "train", watched_train)
        monkeypatch.setattr(models, "measure", watched_measure)

    @property
    def layers(self):
        return [layers for layers, _ in self.trained]


def test_a_run_of_all_stages(source, tmp_path, monkeypatch, capsys):
    watched = Watched(monkeypatch)
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps({"prompt": e.prompt, "completion": e.answer}) + "\n" for e in EXAMPLES))
    assert (
        main(
            [
                "run",
                "--model",
                source,
                "--data",
                str(data),
                "--held-out",
                "0.1",
                "--steps",
                "9",
                "--probe-steps",
                "3",
                "--batch-size",
                "4",
                "--lr",
                "1e-2",
                "--ratio",
                "auto",
                "--max-lost",
                "1",
                "--check-rows",
                "3",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    said = capsys.readouterr()
    # the probe; the dense model and two cuts for the check; the runs
    assert watched.layers == [6, 6, 4, 3, 6, 3]
    assert [len(rows) // 4 for _, rows in watched.trained] == [3, 3, 3, 3, 9, 6]
    probe, *checks, dense, pruned = [rows for _, rows in watched.trained]
    assert checks == [pruned[:12]] * 3 and dense == probe + pruned  # the check sees the rows after the probe's
    auto = json.loads((out / "auto.json").read_text())
    results = json.loads((out / "results.json").read_text())
    assert results["auto"] == auto and auto["count"] == 3 and auto["candidates"] == [1, 2, 3]
    assert len(results["plan"]["kept"]) == 3 and auto["spent"] == 9
    scores = results["probe"]["layer_scores"]
    assert [t["margin"] for t in auto["trials"]] == [margin_at(scores, 2), margin_at(scores, 3)]
    page = (out / "report.html").read_text()
    assert "3 of 6 layers are removed" in page and "took 9 steps beyond" in page and "margin at the cut" in page
    assert len(results["probe"]["watched"]) == 6 and "watched of each layer" in page
    assert auto["reason"] in said.out and "chosen" in said.out and f"auto: {auto['reason']}" in said.err


@pytest.mark.slow
@pytest.mark.in_ci
def test_nothing_is_trained_on_what_is_held_out(source, tmp_path, monkeypatch):
    watched = Watched(monkeypatch, exact={6: 0.5, 5: 0.5, 4: 0.5, 3: 0.5})
    run(source, tmp_path / "out").everything()
    *held, test, also_test = [examples for _, examples in watched.scored]
    assert held == [held[0]] * 3 and len(set(held[0])) == 3
    assert test == also_test == [Example("word 99", "blue")]
    tokenizer = make_tokenizer()
    words = {tokenizer.decode(row) for _, rows in watched.trained for row in rows}
    assert len(words) == 10  # of 13; nine steps of four rows are more than an epoch of the 30 or so that are left
    assert not any(word.startswith(example.prompt + " " + example.answer) for word in words for example in held[0])
    assert {word.split("</s>")[0] for word in words} | {f"{e.prompt} {e.answer}" for e in held[0]} == {
        f"{e.prompt} {e.answer}" for e in EXAMPLES
    }


def test_a_cut_is_tried_as_it_is_made(source, tmp_path, monkeypatch):
    made = []
    cut = RunModels.cut

    def spied(self, plan):
        model, tokenizer = cut(self, plan)
        made.append((plan, {name: tensor.clone() for name, tensor in model.state_dict().items()}))
        return Loaded(model, tokenizer)

    monkeypatch.setattr(RunModels, "cut", spied)
    Watched(monkeypatch, exact={6: 0.5, 5: 0.5, 4: 0.5, 3: 0.1})
    job = run(source, tmp_path / "out", max_lost=0.2, merge=1)
    plan = job.make_plan()
    assert [len(tried.removed) for tried, _ in made] == [2, 3] and made[0][0] == plan and len(plan.merge) == 1
    job.cut(plan)
    assert made[2][0] == plan
    assert all(torch.equal(tensor, made[2][1][name]) for name, tensor in made[0][1].items())


@pytest.mark.parametrize("adapters", ["keep", "discard"])
def test_the_dense_model_starts_from_what_the_cuts_start_from(source, tmp_path, monkeypatch, adapters):
    started = []
    tune = pipeline.tune

    def spied(model, *args, **options):
        started.append(model.model.layers[0].self_attn.q_proj.weight.detach().clone())
        return tune(model, *args, **options)

    monkeypatch.setattr(pipeline, "tune", spied)
    Watched(monkeypatch, exact={6: 0.5, 5: 0.5, 4: 0.5, 3: 0.5})
    run(source, tmp_path / "out", adapters=adapters, patch=False, merge=0).make_plan()
    original = AutoModelForCausalLM.from_pretrained(source).model.layers[0].self_attn.q_proj.weight
    assert len(started) == 3 and all(torch.equal(weight, started[0]) for weight in started)
    assert torch.equal(started[0], original) == (adapters == "discard")


@pytest.mark.slow
@pytest.mark.in_ci
def test_an_interrupted_check_goes_on(source, tmp_path, monkeypatch):
    watched = Watched(monkeypatch, exact={6: 0.5, 5: 0.5, 4: 0.5, 3: 0.1})
    watched.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out").make_plan()
    assert watched.layers == [6, 6, 4] and not (tmp_path / "out" / "plan.json").exists()
    watched.stop_at = None
    assert len(run(source, tmp_path / "out").make_plan().removed) == 2
    assert watched.layers == [6, 6, 4, 3]
    (tmp_path / "out" / "plan.json").unlink()
    assert len(run(source, tmp_path / "out").make_plan().removed) == 2
    assert watched.layers == [6, 6, 4, 3]


def test_a_bound_that_no_cut_meets_can_be_raised(source, tmp_path, monkeypatch):
    watched = Watched(monkeypatch, exact={6: 0.5, 5: 0.4, 4: 0.3, 3: 0.2})
    out = tmp_path / "out"
    with pytest.raises(InvalidArgument, match=r"max_lost = 0.01: .* at least 20.0% \(removing 1\)"):
        run(source, out).everything()
    assert watched.layers == [6, 6, 4, 5]  # and no dense run
    assert not (out / "plan.json").exists() and not (out / "cut").exists()
    with pytest.raises(InvalidArgument, match="another check_steps"):
        run(source, out, check_steps=3)
    assert len(run(source, out, max_lost=0.25).make_plan().removed) == 1
    assert watched.layers == [6, 6, 4, 5]
    assert json.loads((out / "run.json").read_text())["max_lost"] == 0.25
    with pytest.raises(InvalidArgument, match="another max_lost"):  # now something was chosen by it
        run(source, out, max_lost=0.5)
    run(source, out, max_lost=0.25)


WRONG = {
    "max_lost": [{"max_lost": value} for value in (-0.1, 1.1, math.nan, "1", True)] + [{"max_lost": 0.1, "ratio": 0.4}],
    "check_steps": [{"check_steps": value} for value in (0, 7, 1.5, True)] + [{"check_steps": 2, "ratio": 0.4}],
    "check_rows": [{"check_rows": value} for value in (0, 2.5, True)] + [{"check_rows": 2, "ratio": None, "count": 2}],
    "ratio": [{"ratio": "most"}],
    "count": [{"count": 2}],
    "of": [{"of": "parameters"}],
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_by_name(name):
    for options in WRONG[name]:
        with pytest.raises(InvalidArgument, match=f"\\b{name} = "):
            Job("model", 9, **{"ratio": "auto", "probe_steps": 3, **options})


def test_a_job_without_it_is_what_it_was():
    assert not {"max_lost", "check_steps", "check_rows"} & set(Job("model", 9).to_dict())
    auto = Job("model", 9, ratio="auto", probe_steps=3).to_dict()
    assert (auto["max_lost"], auto["check_steps"], auto["ratio"]) == (0.01, 3, "auto")
    assert Job("model", 9, ratio="auto", probe_steps=7).checking == 2  # all that are left


def test_a_plan_alone_cannot_choose(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", "igia.safetensors", "--ratio", "auto", "--out", "plan.json"])
    assert stop.value.code == 2 and "gradpruner run --ratio auto" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["run", "--ratio", "most"])
    assert stop.value.code == 2 and "invalid number 'most'" in capsys.readouterr().err


def test_the_margin_is_that_of_the_plan(source, tmp_path):
    job = run(source, tmp_path / "out")
    igia: Igia = job.run_probe()
    scores = igia.layer_scores().tolist()
    for count in (1, 2, 3, 4, 5):
        assert margin_at(scores, count) == pytest.approx(igia.margin(igia.plan(count=count)))
