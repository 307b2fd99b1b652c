"""A comparison on a tiny model: every model made once, the same whoever makes it and however often it is stopped."""

from __future__ import annotations

import json
import random

import pytest
import torch
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
    counting,
    files,
    job,
)
from word_tokenizers import make_tokenizer

import gradpruner
from gradpruner.compare import experiment, outputs, scoring
from gradpruner.compare.analysis import DENSE
from gradpruner.compare.cells import Cell
from gradpruner.compare.experiment import Compare
from gradpruner.data.collator import Collator
from gradpruner.data.examples import Example
from gradpruner.data.tokens import tokenize
from gradpruner.errors import InvalidArgument
from gradpruner.methods import METHODS
from gradpruner.presets import Preset
from gradpruner.training.evaluate import exact_matches, perplexity


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


def test_a_second_run_makes_nothing(base, home):
    made, written, _, _ = base
    before = files(made.folder)
    with counting() as calls:
        again = comparison(home, made.folder)
        again.work()
        assert outputs.write(again, costs=False)["json"]["rows"] == written["json"]["rows"]
    assert calls == {"tune": [], "watch": []} and files(made.folder) == before


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
        ({"recipe": {"learning_rate": 1e-3}}, r"recipe \(learning_rate\)"),
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
    presets = [{"preset": preset} for preset in ("paper", Preset.of(patch=False), Preset.of(weight=0.5))]
    for changed in ({"recipe": {"seed": 5}}, {"ratio": 0.2}, *presets):
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


def test_options_that_do_not_fit_the_model_are_refused_before_anything_is_trained(home, tmp_path):
    compared = comparison(home, tmp_path / "out", methods=["drop-last", "gradpruner:merge=3"], ratios=[0.4])
    with pytest.raises(InvalidArgument, match=r"gradpruner:merge=3, 2 of 6 layers removed: merge = 3; accepted"):
        compared.work()
    assert not (tmp_path / "out" / "cells").exists() and not (tmp_path / "out" / "probes").exists()


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
