"""A comparison on a tiny model: every model made once, the same whoever makes it and however often it is stopped."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import logging
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_comparisons import (
    BATCH,
    HELD_OUT,
    LAYERS,
    PROBE,
    SEEDS,
    STEPS,
    TEST,
    TRAIN,
    USED,
    comparison,
    job,
    make_home,
)
from transformers import AutoModelForCausalLM, LlamaConfig
from word_tokenizers import make_tokenizer

import gradpruner
from gradpruner.cli.main import main
from gradpruner.compare import costs, experiment, processes, scoring, sensitivity
from gradpruner.compare import outputs as compared
from gradpruner.compare.analysis import DENSE
from gradpruner.compare.cells import Cell, finished
from gradpruner.compare.experiment import Compare
from gradpruner.compare.operations import training_operations
from gradpruner.compare.results import Cost, Result, read_results
from gradpruner.compare.sensitivity_factors import FACTORS
from gradpruner.errors import GradPrunerError, InvalidArgument
from gradpruner.methods import METHODS, GradPruner, parse_method
from gradpruner.model.loss import IGNORED
from gradpruner.plan import Plan
from gradpruner.storage.locks import claim
from gradpruner.training.data import Collator, Example, tokenize
from gradpruner.training.evaluate import exact_matches, perplexity
from gradpruner.training.recipe import Recipe, schedule


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


KIND = GradPruner().settings.kind  # by default, and another one
OTHER = "norm" if KIND != "norm" else "squared"


@contextlib.contextmanager
def counting():
    """Calls of `tune` and `watch` in `compare`: their rows and recipes."""
    calls = {"tune": [], "watch": []}
    with pytest.MonkeyPatch.context() as patch:
        for name in calls:
            real = getattr(experiment, name)

            def spy(model, tokenizer, rows, recipe, _name=name, _real=real, **options):
                calls[_name].append({"rows": list(rows), "recipe": recipe, "options": options})
                return _real(model, tokenizer, rows, recipe, **options)

            patch.setattr(experiment, name, spy)
        yield calls


@contextlib.contextmanager
def logged(lines):
    """Inside, what a comparison logs goes into a list."""
    handler, package = logging.Handler(), logging.getLogger("gradpruner")
    handler.emit = lambda record: lines.append(record.getMessage())
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def base(home, tmp_path_factory):
    """A finished comparison, what was written of it, and the calls that made it."""
    out, said = tmp_path_factory.mktemp("base") / "out", []
    with counting() as calls, logged(said):
        made = comparison(home, out)
        made.work()
    return made, compared.write(made, costs=False), calls, said


def files(folder, names=("results.csv", "losses.csv", "differences.csv")):
    return {name: (folder / name).read_bytes() for name in names}


def results(folder):
    """Everything but wall time."""
    return [dataclasses.replace(result, seconds=0.0) for result in read_results(folder / "results.csv")]


def lines(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_model_is_made_once(base):
    made, _, calls, said = base
    cells = made.cells(LAYERS)
    assert len(cells) == len(set(cells)) == 2 + 2 * 3
    assert [(c.method, c.count, c.seed) for c in cells[:3]] == [(DENSE, 0, 0), (DENSE, 0, 1), ("gradpruner", 2, 0)]
    found = made.finished()
    assert {(c["method"], c["count"], c["seed"]) for c in found} == {(c.method, c.count, c.seed) for c in cells}
    assert len(found) == 8 and [(c["method"], c["seed"]) for c in found[:2]] == [(DENSE, 0), (DENSE, 1)]
    assert len(calls["tune"]) == len({c["trained"] for c in found})
    assert len(calls["watch"]) == len(SEEDS)  # one probe a seed
    assert sum("probing 3 steps" in line for line in said) == 2 and sum("exact match" in line for line in said) == 8


def test_adapters_of_the_cut_model_are_as_wide_as_a_method_says(home, tmp_path):
    methods = ["gradpruner", "gradpruner:preset=paper", "drop-last:rank_factor=2", "shortgpt"]
    with counting() as calls:
        comparison(home, tmp_path / "out", methods, seeds=(0,)).work()
    widths = [(call["recipe"].rank, call["recipe"].alpha) for call in calls["tune"]]
    assert widths == [(4, 32), (16, 64), (4, 32), (8, 45), (4, 32)]  # dense first
    assert {call["recipe"].rank for call in calls["watch"]} == {4}


def test_the_layers_that_a_method_says(base):
    made, *_ = base
    for cell in made.finished():
        assert len(cell["removed"]) == cell["count"] == (0 if cell["method"] == DENSE else 2)
        assert cell["layers"] == LAYERS - cell["count"] and cell["ratio"] == cell["count"] / LAYERS
        if cell["method"] == "drop-last":
            assert cell["removed"] == [4, 5] and cell["merged"] == {}
    assert {tuple(c["removed"]) for c in made.finished()} > {(), (4, 5)}  # they do not all choose alike


def test_one_budget(base, home):
    """The dense model trains on all rows of its seed, every pruned one on those after the probe's."""
    _, _, calls, _ = base
    shuffled = list(TRAIN)
    random.Random(0).shuffle(shuffled)
    rows = tokenize(shuffled[HELD_OUT:], make_tokenizer(), max_length=512)
    lengths = []
    for call in calls["tune"]:
        order = list(rows)
        random.Random(call["recipe"].seed).shuffle(order)
        whole, probed = order[: STEPS * BATCH], PROBE * BATCH
        assert call["rows"] in (whole, whole[probed:])
        lengths.append(len(call["rows"]))
    assert lengths.count(STEPS * BATCH) == len(SEEDS) and set(lengths) == {16, 10}
    for call, seed in zip(calls["watch"], SEEDS, strict=True):
        order = list(rows)
        random.Random(seed).shuffle(order)
        assert call["rows"] == order[: PROBE * BATCH] and call["recipe"].seed == seed
        assert call["options"]["of_steps"] == STEPS  # the learning rates of the whole run
    for cell in base[0].finished():
        steps = STEPS if cell["method"] == DENSE else STEPS - PROBE
        assert cell["training"]["steps"] == len(cell["training"]["losses"]) == steps


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


def test_a_second_run_makes_nothing(base, home):
    made, written, _, _ = base
    before = files(made.folder)
    with counting() as calls:
        again = comparison(home, made.folder)
        again.work()
        assert compared.write(again, costs=False)["json"]["rows"] == written["json"]["rows"]
    assert calls == {"tune": [], "watch": []} and files(made.folder) == before


@pytest.fixture
def copied(base, tmp_path):
    shutil.copytree(base[0].folder, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("more", "expected", "probes"),
    [
        ({"methods": [*USED, "magnitude"]}, [("magnitude", 2, 0), ("magnitude", 2, 1)], 0),
        ({"methods": ["drop-last"], "ratios": (0.4, 0.2)}, [("drop-last", 1, 0), ("drop-last", 1, 1)], 0),
        ({"methods": ["gradpruner"], "seeds": (0, 1, 2)}, [(DENSE, 0, 2), ("gradpruner", 2, 2)], 1),
    ],
)
def test_what_is_added_is_all_that_is_made(home, copied, more, expected, probes):
    before = {path.name: path.read_bytes() for path in (copied / "cells").iterdir()}
    with counting() as calls:
        added = comparison(home, copied, **more)
        added.work()
    assert len(calls["tune"]) <= 2 and len(calls["watch"]) == probes
    now = {path.name: path.read_bytes() for path in (copied / "cells").iterdir()}
    assert all(now[name] == content for name, content in before.items())
    assert sorted(now.keys() - before.keys()) == sorted(f"{Cell(*cell).name}.json" for cell in expected)
    keys = {json.loads(now[f"{Cell(*cell).name}.json"])["trained"] for cell in expected}
    known = {json.loads(content)["trained"] for content in before.values()}
    assert len(calls["tune"]) == len(keys - known)


def test_equal_models_are_trained_once(home, tmp_path, monkeypatch):
    monkeypatch.setattr(METHODS["shortgpt"], "scores", lambda self, clues: [6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    with counting() as calls:
        made = comparison(home, tmp_path / "out", ["drop-last", "shortgpt", "magnitude"], (0,), dense=False)
        made.work()
    cells = {cell["method"]: cell for cell in made.finished()}
    assert cells["drop-last"]["trained"] == cells["shortgpt"]["trained"] != cells["magnitude"]["trained"]
    assert len(calls["tune"]) == 2 and cells["drop-last"]["right"] == cells["shortgpt"]["right"]


def test_two_spellings_of_one_method(home, tmp_path):
    same = ["gradpruner:merge=0", "gradpruner:merge=0,top=0.5,patch=true", "gradpruner:merge=0,probe_steps=3,rank=4"]
    with counting() as calls:
        made = comparison(home, tmp_path / "out", same, (0,), dense=False)
        made.work()
    assert len(calls["tune"]) == len(calls["watch"]) == 1 and len(made.finished()) == 3
    twice = comparison(home, tmp_path / "out", ["drop-last", "drop-last:patch=false"], (0, 0))
    assert len(twice.cells(LAYERS)) == 2  # dense, drop-last


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"steps": 9}, "steps"),
        ({"recipe": {"learning_rate": 1e-3}}, "recipe"),
        ({"probe_steps": 4}, "probe_steps"),
        ({"max_length": 64}, "max_length"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"attention": "eager"}, "attention"),
        ({"train_on": "all"}, "train_on"),
        ({"held_out": 7}, "held_out, train_examples"),
        ({"test": TEST[:-1]}, "data, test_examples"),
        ({"train": [*TRAIN[:-1], Example("other", "a")]}, "data"),
    ],
)
def test_other_terms_are_refused_by_name(base, home, changed, name):
    folder = base[0].folder
    before = sorted(folder.rglob("*"))
    with pytest.raises(InvalidArgument, match=f"holds a comparison with another {name};"):
        comparison(home, folder, **changed)
    assert sorted(folder.rglob("*")) == before


def test_what_the_methods_say_is_no_term(base, home):
    for changed in ({"recipe": {"seed": 5}}, {"ratio": 0.2}, {"preset": "paper"}, {"patch": False}, {"weight": 0.5}):
        comparison(home, base[0].folder, **changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["shortest"]}, "method = 'shortest'; accepted are block, drop-last"),
        ({"methods": ["gradpruner:probe_steps=8"]}, "gradpruner:probe_steps=8: 8 steps to probe of 8; expected fewer"),
        ({"methods": []}, "methods, ratios or seeds is empty"),
        ({"ratios": ()}, "methods, ratios or seeds is empty"),
        ({"seeds": ()}, "methods, ratios or seeds is empty"),
        ({"held_out": 50}, "50 training and 21 test examples, 50 held out"),
        ({"test": []}, "0 test examples"),
    ],
)
def test_what_cannot_be_compared_is_refused_first(home, tmp_path, options, message):
    with pytest.raises(InvalidArgument, match=message):
        comparison(home, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_wrong_ratio_is_told_before_processes_start(home, tmp_path):
    made = comparison(home, tmp_path / "out", ratios=(0.05,))
    with pytest.raises(InvalidArgument, match=r"ratio = 0\.05 of 6 layers rounds to none"):
        processes.work_in_processes(made, 2)


def test_two_processes_find_what_one_finds(base, home, tmp_path):
    made, said = comparison(home, tmp_path / "out"), []
    with logged(said):
        processes.work_in_processes(made, 2)
    assert sum("exact match" in line for line in said) == 8  # of both processes
    compared.write(made, costs=False)
    assert results(made.folder) == results(base[0].folder)
    for name in ("losses.csv", "differences.csv"):
        assert (made.folder / name).read_bytes() == (base[0].folder / name).read_bytes()


DYING = """
import os, signal, sys
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
from pathlib import Path
import small_comparisons
from gradpruner.compare import experiment
real, calls = experiment.tune, []
def dying(*args, **options):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **options)
experiment.tune = dying
small_comparisons.comparison(Path({home!r}), {out!r}).work()
"""


def test_killed_and_resumed(base, home, tmp_path):
    out = tmp_path / "out"
    code = DYING.format(path=[str(Path(__file__).parent), *sys.path], home=str(home), out=str(out))
    died = subprocess.run([sys.executable, "-c", code], env=os.environ.copy(), capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr[-2000:]
    assert len(list((out / "cells").iterdir())) == 3
    unfinished = comparison(home, out).cells(LAYERS)[3]
    with claim(out / "locks" / unfinished.name) as mine:
        assert mine  # the dead hold nothing
    with counting() as calls:
        made = comparison(home, out)
        made.work()
        compared.write(made, costs=False)
    assert len(calls["tune"]) == len(base[2]["tune"]) - 3 and len(calls["watch"]) == 1
    assert results(out) == results(base[0].folder)
    for name in ("losses.csv", "differences.csv"):
        assert (out / name).read_bytes() == (base[0].folder / name).read_bytes()


def test_what_another_is_making_is_left_to_it(copied, home):
    made = comparison(home, copied)
    lost = made.cells(LAYERS)[4]
    (copied / "cells" / f"{lost.name}.json").unlink()
    with claim(copied / "locks" / lost.name) as mine:
        assert mine
        made.work()
        assert not (copied / "cells" / f"{lost.name}.json").exists() and len(made.finished()) == 7
        compared.write(made, costs=False)  # of what there is
        assert len(read_results(copied / "results.csv")) == 7
    with counting() as calls:
        made.work()
    assert len(made.finished()) == 8 and calls["tune"] == []  # it was trained, only its cell was lost


def test_a_failed_process_is_told_of(home, tmp_path, monkeypatch):
    class Child:
        exitcode = 1

        def __init__(self, target, args):
            assert target is processes._work and args[1:3] in ((0, 2), (1, 2))

        start = join = lambda self: None

    spawn = SimpleNamespace(Process=Child, Queue=queue.SimpleQueue)
    monkeypatch.setattr(processes.multiprocessing, "get_context", lambda kind: spawn)
    with pytest.raises(GradPrunerError, match="2 of 2 processes failed"):
        processes.work_in_processes(comparison(home, tmp_path / "out"), 2)


@pytest.mark.parametrize("train_on", ["answer", "all"])
def test_tested(home, train_on):
    model, tokenizer = gradpruner.model.load.load_model(home / "model")
    with torch.no_grad():  # a model that says " a" whatever it is asked, and then ends
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        embedded = torch.nn.functional.normalize(model.model.embed_tokens.weight, dim=1)
        colon, space, *letters = (tokenizer(text)["input_ids"][0] for text in (":", " ", "a", "b", "c"))
        model.lm_head.weight.zero_()
        model.lm_head.weight[space] = 5 * embedded[colon]
        model.lm_head.weight[letters[0]] = 5 * embedded[space]
        model.lm_head.weight[tokenizer.eos_token_id] = 5 * embedded[letters].sum(0)
    found = scoring.tested(model, tokenizer, TEST, job(home, train_on=train_on))
    rows = tokenize(TEST, tokenizer, max_length=512)
    collate = Collator(tokenizer)
    right = exact_matches(model, rows, collate=collate, batch_size=4)
    assert right == [e.answer == "a" for e in TEST] and 0 < sum(right) < len(right)
    assert found["right"] == "".join("01"[r] for r in right) and found["exact_match"] == sum(right) / len(right)
    assert found["macro_f1"] == pytest.approx((2 * 7 / (21 + 7) + 0 + 0) / 3)  # "a" is right 7 of the 21 times
    every = tokenize(TEST, tokenizer, max_length=512, train_on=train_on)
    assert found["perplexity"] == pytest.approx(perplexity(model, every, collate=collate, batch_size=4), rel=1e-5)
    assert found["examples"] == len(TEST)
    texts = [Example(e.prompt, "") for e in TEST]
    plain = scoring.tested(model, tokenizer, texts, job(home, train_on=train_on))
    assert plain["exact_match"] is plain["macro_f1"] is None and plain["right"] == ""
    rows = tokenize(texts, tokenizer, max_length=512)
    assert plain["perplexity"] == pytest.approx(perplexity(model, rows, collate=collate, batch_size=4), rel=1e-5)
    many = [Example(f"{i}:", "abcdefghijk"[i % 11]) for i in range(22)]
    assert scoring.tested(model, tokenizer, many, job(home))["macro_f1"] is None  # too many classes
    assert scoring.tested(model, tokenizer, many[:10], job(home))["macro_f1"] is not None


def test_an_answer_without_a_prompt_has_a_class_too(home, monkeypatch):
    model, tokenizer = gradpruner.model.load.load_model(home / "model")
    seen, bare = [], [Example("", "ab"), Example("", "cd")]
    monkeypatch.setattr(scoring, "macro_f1", lambda said, truth: seen.append((said, truth)) or 1.0)
    scoring.tested(model, tokenizer, bare, job(home))
    (said, truth), rows = seen[0], tokenize(bare, tokenizer, max_length=9)
    assert truth == [tuple(row["labels"][1:]) for row in rows]  # nothing stands before the first: nobody says it
    assert [len(s) for s in said] == [len(t) for t in truth] == [2, 2]


def cell(method, right, count=2, seed=0):
    return {"method": method, "count": count, "seed": seed, "right": right}


def test_differences_by_hand():
    right = {seed: "1101011101110110" * 2 for seed in (0, 1)} | {1: "1111011101010110" * 2}
    theirs = {0: "0101001101100110" * 2, 1: "0100011001110010" * 2}
    cells = [
        *[cell(compared.OURS, row, seed=seed) for seed, row in right.items()],
        *[cell("laco", row, seed=seed) for seed, row in theirs.items()],
        cell("block", theirs[1], seed=1),  # only one seed of it
        cell("taylor", theirs[1], seed=7),  # none in common
        cell("magnitude", theirs[1], count=3),  # ours is not there
        cell(DENSE, "1" * 32, count=0),
        cell("random", ""),  # text without answers
    ]
    found = compared._differences(cells)
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


# costs


def loading(home, attention="eager"):
    return {"source": str(home / "model"), "dtype": "float32", "attention": attention, "trust_remote_code": False}


def cost_of(home, plan, recipe, folder, attention="eager"):
    tokenizer, given = make_tokenizer(), loading(home, attention)
    rows = schedule(tokenize(TRAIN, tokenizer, max_length=64), 8, recipe)
    costs._write(given, plan, str(folder))
    cost = costs._measured({**given, "source": str(folder)}, len(plan.removed) if plan else 0, rows, recipe)
    labels = Collator(tokenizer)(rows[: recipe.batch_size])["labels"]
    return cost, (*labels.shape, int((labels[:, 1:] != IGNORED).any(0).sum()))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_operations_bytes_and_layers(home, tmp_path, monkeypatch, attention):
    monkeypatch.setattr(costs, "generation_speed", lambda model, tokenizer, new_tokens: 32.0)
    recipe = Recipe(batch_size=2, accumulation=2, learning_rate=1e-3, rank=0)
    hidden, inner, vocabulary, flops = 16, 24, 259, {}
    for plan in (None, Plan(LAYERS, drop=[1, 3], merge=[5])):
        cut = None if plan is None else Plan(LAYERS, plan.removed)
        cost, (rows, width, judged) = cost_of(home, cut, recipe, tmp_path / f"cut-{len(flops)}", attention)
        left = LAYERS - cost.count
        assert (cost.layers, cost.count) == (left, 0 if plan is None else 3)
        linear = left * (2 * hidden * hidden + 2 * hidden * hidden // 2 + 3 * hidden * inner)
        head = judged * hidden * vocabulary  # no logits of a prompt's tokens
        products = left * 2 * rows * width * width * hidden * 2  # q k' and its product with v, all heads
        expected = (
            3 * (2 * rows * (width * linear + head) + products) * recipe.accumulation
        )  # backward: twice the forward
        assert cost.train_flops == pytest.approx(expected, rel=0.01)
        flops[left] = cost.train_flops
        model = AutoModelForCausalLM.from_pretrained(home / "model")
        if plan is not None:
            gradpruner.apply(model, Plan(LAYERS, plan.removed))
        gradpruner.save(model, tmp_path / str(left))
        stored = load_file(tmp_path / str(left) / "model.safetensors")
        assert cost.checkpoint_bytes == sum(t.numel() * t.element_size() for t in stored.values())
        assert cost.generate_seconds == 2 and cost.train_step_seconds > 0
    head = flops[6] - 2 * (flops[6] - flops[3])  # the part that does not go with the layers
    assert head > 0 and flops[3] == pytest.approx((flops[6] - head) / 2 + head)


def test_adapters_cost_less_than_all_weights(home, tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "generation_speed", lambda model, tokenizer, new_tokens: 32.0)
    full, _ = cost_of(home, None, Recipe(batch_size=2, rank=0), tmp_path / "full")
    lora, _ = cost_of(home, None, Recipe(batch_size=2, rank=1), tmp_path / "lora")
    assert full.train_flops * 0.6 < lora.train_flops < full.train_flops  # no gradients of most weights
    assert full.checkpoint_bytes == lora.checkpoint_bytes


def test_measured_in_turns_without_merging_and_away_from_the_dense_model(home, tmp_path, monkeypatch):
    seen, ranks, written = [], [], []
    write = costs._write

    def writing(loading, plan, folder):
        written.append((loading["source"], plan))
        write(loading, plan, folder)

    def measured(loading, count, rows, recipe):
        config = json.loads(Path(loading["source"], "config.json").read_text())
        seen.append((config["num_hidden_layers"], count))
        assert loading["source"] != str(home / "model") and Path(loading["source"]).parent.parent == tmp_path
        ranks.append(recipe.rank)
        assert len(rows) == costs.STEPS * BATCH
        n = (7, 1, 3)[(len(seen) - 1) // 2]
        return Cost(config["num_hidden_layers"], count, n / 2, n, float(n), n, 100, 1e9)

    class Pool:
        def __init__(self, processes, maxtasksperchild):
            assert (processes, maxtasksperchild) == (1, 1)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def apply(self, function, arguments):
            return function(*arguments)

    monkeypatch.setattr(costs, "_measured", measured)
    monkeypatch.setattr(costs, "_write", writing)
    monkeypatch.setattr(costs.multiprocessing, "get_context", lambda kind: type(kind, (), {"Pool": Pool}))
    plan = Plan(LAYERS, drop=[1], merge=[3])
    dense, pruned = costs.measure(
        loading(home),
        [None, plan],
        [{"input_ids": [1]}] * 100,
        Recipe(batch_size=BATCH),
        rank_factor=4,
        beside=tmp_path,
    )
    assert ranks == [8, 32] * 3
    assert seen == [(6, 0), (4, 2)] * 3
    # by another process, once
    assert written == [(str(home / "model"), None), (str(home / "model"), Plan(LAYERS, drop=[1, 3]))]
    assert dense == Cost(6, 0, 1.5, 3, 3.0, 3, 100, 1e9) and pruned.layers == 4
    assert isinstance(dense.train_peak_bytes, int) and isinstance(dense.train_step_seconds, float)
    assert not list(tmp_path.iterdir())  # all that was written is gone


@pytest.mark.slow
def test_measured_in_a_process_of_its_own(tmp_path):
    """A model of 100 MB, and half of it: nothing of what was cut off is in the memory of what is left."""
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=8,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    recipe = Recipe(batch_size=BATCH, rank=4)
    rows = schedule(tokenize(TRAIN, make_tokenizer(), max_length=64), 8, recipe)
    given = {"source": str(tmp_path / "model")}
    dense, pruned = costs.measure(given, [None, Plan(4, drop=[2, 3])], rows, recipe, rounds=1, beside=tmp_path)
    assert (dense.layers, pruned.layers, pruned.count) == (4, 2, 2)
    assert all(value > 0 for value in dataclasses.asdict(pruned).values())
    assert dense.checkpoint_bytes > 1e8 and pruned.checkpoint_bytes < 0.52 * dense.checkpoint_bytes
    gone = dense.checkpoint_bytes - pruned.checkpoint_bytes
    assert dense.generate_peak_bytes - pruned.generate_peak_bytes > 0.8 * gone
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_costs_are_measured_once_a_size(base, copied, home, monkeypatch):
    seen = {}

    def measure(loading, plans, rows, recipe, rank_factor, beside):
        assert beside == copied and (copied / "report.html").is_file()  # what is there already is not lost by a failure
        assert rank_factor == GradPruner().settings.rank_factor
        seen.update(loading=loading, plans=plans, rows=rows, recipe=recipe)
        return [
            Cost(6 - (len(p.removed) if p else 0), len(p.removed) if p else 0, 1.0, 2, 3.0, 4, 5, 6.0) for p in plans
        ]

    monkeypatch.setattr(compared, "measure", measure)
    made = comparison(home, copied)
    compared.write(made, costs=True)
    assert [p if p is None else len(p.removed) for p in seen["plans"]] == [None, 2]
    assert seen["loading"]["source"] == str(home / "model") and seen["rows"] == base[2]["tune"][0]["rows"]
    assert len(lines(copied / "costs.csv")) == 2
    monkeypatch.undo()
    before = (copied / "costs.csv").read_bytes()
    compared.write(made, costs=False)  # what was measured before is shown again
    assert (copied / "costs.csv").read_bytes() == before and "costs" in (copied / "report.html").read_text().lower()


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm", "eager"])
def test_operations_of_experts_are_counted(experts):
    from transformers import MixtralConfig

    torch.manual_seed(0)
    hidden, inner, vocabulary, rows, tokens, top = 16, 24, 61, 2, 8, 2
    config = MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=top,
        experts_implementation=experts,
    )
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.randint(0, vocabulary, (rows, tokens))
    found = training_operations(model, {"input_ids": ids, "labels": ids})
    matrices = 4 * hidden * hidden + hidden * 4 + top * 3 * hidden * inner + hidden * vocabulary
    attention = 2 * rows * tokens * tokens * hidden * 2
    assert found == pytest.approx(3 * (2 * rows * tokens * matrices + attention), rel=0.01)
    assert model.config._experts_implementation == experts


def test_operations_of_attention_that_torch_does_not_see(home):
    """A kernel of somebody else's is replaced while the step is counted."""
    from transformers import AttentionInterface

    def unseen(*args, **options):
        pytest.fail("an attention that is not counted")

    AttentionInterface.register("unseen", unseen)
    model = AutoModelForCausalLM.from_pretrained(home / "model")
    ids = torch.arange(20).reshape(2, 10)
    wanted = training_operations(model, {"input_ids": ids, "labels": ids})
    model.set_attn_implementation("unseen")
    assert training_operations(model, {"input_ids": ids, "labels": ids}) == wanted
    assert model.config._attn_implementation == "unseen"


def test_a_comparison_with_a_run_that_diverged_says_so(copied, home, capsys):
    (path,) = [p for p in (copied / "trained").glob("*.json") if p.stem == finished_of(copied, "drop-last")]
    trained = json.loads(path.read_text())
    trained["training"]["losses"] = [2.0] * 3 + [90.0] * 2
    path.write_text(json.dumps(trained))
    found = compared.write(comparison(home, copied), costs=False)
    assert "the run of drop-last, 2 layers less, seed 0, has diverged: its loss rose from 2 to 90" in found["failed"]
    assert found["json"]["failed"] == [found["failed"]] and found["failed"] in found["line"]
    assert "has diverged" in (copied / "report.html").read_text()
    assert main(["report", str(copied)]) == 0 and "has diverged" in capsys.readouterr().out


def finished_of(folder, method):
    return next(c["trained"] for c in finished(folder) if c["method"] == method and c["seed"] == 0)


# commands


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


# sensitivity

USUAL = {"probe_steps": 20, "rank": 8, "share": 1.0}


def everything():
    return sensitivity.variants({factor: values for factor, (_, _, values) in FACTORS.items()}, USUAL)


def test_one_factor_at_a_time():
    rows = everything()
    assert [(r["factor"], r["value"]) for r in rows] == [(f, str(v)) for f, (_, _, vs) in FACTORS.items() for v in vs]
    for row in rows:
        option, also, _ = FACTORS[row["factor"]]
        usual, options = parse_method("gradpruner").options, parse_method(row["method"]).options
        changed = {k for k, v in options.items() if v != usual[k]}
        beside = {also.partition("=")[0]} - {""}
        if row["is_default"]:
            assert not changed
            continue
        assert beside <= changed <= {option, *beside} and str(options[option]) == row["value"]


def test_a_default_is_flagged_once_a_factor():
    usual, flagged = {**vars(GradPruner().settings), **USUAL}, {}
    for row in everything():
        flagged.setdefault(row["factor"], []).extend([row["value"]] * row["is_default"])
    for factor, values in flagged.items():
        option, also, known = FACTORS[factor]
        # what needs something else beside it to matter is not the default, whatever its value
        assert values == [str(usual[option])] * (not also and usual[option] in known)
    assert flagged["probe steps"] == ["20"] and flagged["rank of the probe"] == ["8"]
    assert flagged["layer score"] == [KIND] and flagged["share of a merged weight"] == []


def test_all_defaults_are_one_method():
    rows = everything()
    assert {r["method"] for r in rows if r["is_default"]} == {"gradpruner"}
    others = [r["method"] for r in rows if not r["is_default"]]
    assert "gradpruner" not in others
    assert {m for m in others if others.count(m) > 1} == {"gradpruner:merge=3"}  # with the usual share of it, too


def test_no_variant_is_trained_twice(home, tmp_path):
    """merge=3 is a value of one factor, and top=0.2 with merge=3 one of another."""
    rows = sensitivity.variants({"layers merged": (1,), "layer score": (KIND,)}, USUAL)
    methods = [*dict.fromkeys(r["method"] for r in rows), "gradpruner:merge=1,top=0.2"]  # which is the usual share
    with counting() as calls:
        made = comparison(home, tmp_path / "out", methods, (0,), dense=False)
        made.work()
    keys = {cell["method"]: cell["trained"] for cell in made.finished()}
    assert keys.keys() == {"gradpruner:merge=1", "gradpruner"}
    assert len(calls["tune"]) == len(set(keys.values())) and len(calls["watch"]) == 1


def result(method, score, seed=0, count=2):
    return Result(method, count, 0.4, seed, score, None, 1.0, 9, 4, 10, "4 5", "", 8, 1.0, 1.0, 1.0)


def test_scored_is_the_mean_over_seeds_of_what_is_done():
    rows = sensitivity.variants({"layer score": (KIND, OTHER, "normalized")}, USUAL)
    done = [
        result("gradpruner", 0.5),
        result("gradpruner", 0.7, 1),
        result(f"gradpruner:kind={OTHER}", None),
        result("dense", 0.8, count=0),
        result("dense", 0.9, 1, count=0),
    ]
    # of the same folder, but not tried with the others
    done += [result("gradpruner", 0.1, 2), result("gradpruner", 0.2, count=3), result("dense", 0.1, 2, count=0)]
    scored = sensitivity.scored({"rows": rows, "count": 2, "seeds": [0, 1]}, done)
    assert scored == [{**rows[0], "exact_match": pytest.approx(0.6), "dense": pytest.approx(0.85)}]


def test_a_default_given_as_text_is_a_default():
    rows = sensitivity.variants({"probe steps": ["20"], "rank of the probe": ["8"]}, USUAL)
    assert [r["is_default"] for r in rows] == [True, True] and {r["method"] for r in rows} == {"gradpruner"}


def test_layers_and_weights_in_one_comparison(home, tmp_path):
    comparison = Compare(
        job(home),
        TRAIN,
        TEST,
        tmp_path,
        methods=["sparse:layers=drop-last,weights=gblm,pattern=2:4", "drop-last"],
        ratios=(0.5,),
        dense=False,
        held_out=HELD_OUT,
    )
    made = []
    tested = experiment.tested

    def keep(model, *rest):
        made.append(model)
        return tested(model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "tested", keep)
        comparison.work()
    sparse, layers = made
    assert len(sparse.model.layers) == len(layers.model.layers) == 3
    for layer in sparse.model.layers:  # after the adapters were merged into the weights
        assert ((layer.mlp.up_proj.weight != 0).view(-1, 4).sum(1) == 2).all()
    assert float((layers.model.layers[0].mlp.up_proj.weight == 0).float().mean()) < 0.01


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sparse:layers=sparse", "layers = 'sparse'"),
        ("sparse:weights=wonda", "method = 'wonda'"),
        ("sparse:weights=igia", "weights = 'igia'"),
        ("sparse:pattern=4:2", "pattern = '4:2'"),
        ("sparse:ratio=2", "ratio = 2"),
        ("sparse:allocation=best", "allocation = 'best'"),
        ("sparse:allocation=alphapruning,pattern=2:4", "pattern = '2:4'"),
        ("sparse:weights=dsnot,pattern=matrix", "pattern = 'matrix'"),
    ],
)
def test_what_sparse_refuses(text, says):
    with pytest.raises(InvalidArgument, match=says):
        parse_method(text)


def test_options_of_sparse_are_those_of_both_its_methods():
    """A cell is found again by them: what a default means may change."""
    options = parse_method("sparse:layers=laco,weights=dsnot:cycles=9").options
    assert options["layers"] == {"name": "laco", **parse_method("laco").options}
    assert options["weights"] == {"name": "dsnot", "start": "wanda", "cycles": 9, "threshold": 0.1, "overshoot": False}
