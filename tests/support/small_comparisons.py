"""A tiny model and data to compare methods on."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from word_tokenizers import make_tokenizer

from gradpruner.compare import experiment
from gradpruner.compare.experiment import Compare
from gradpruner.compare.results import Result, read_results
from gradpruner.data.examples import Example
from gradpruner.methods import GradPruner
from gradpruner.run.job import Job
from gradpruner.training.recipe import Recipe

LAYERS, STEPS, PROBE, BATCH, HELD_OUT = 6, 8, 3, 2, 6
TRAIN = [Example(f"word {i % 7} of {i}:", "abc"[i % 3]) for i in range(50)]
TEST = [Example(f"word {i % 5} of {i}:", "abc"[i % 3]) for i in range(100, 121)]


def make_home(folder):
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):  # no two of them nearly equal
            for parameter in layer.parameters():
                parameter.mul_(1 + 0.5 * (index * 5 % 4) * (parameter.ndim == 2))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = [json.dumps({"text": e.prompt, "label": e.answer}) for e in (*TRAIN, *TEST)]
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder


def job(home, **changed):
    recipe = Recipe(**{"batch_size": BATCH, "learning_rate": 1e-2, "rank": 4, **changed.pop("recipe", {})})
    return Job(str(home / "model"), **{"steps": STEPS, "recipe": recipe, "probe_steps": PROBE, **changed})


USED, SEEDS = ["gradpruner", "drop-last", "shortgpt"], (0, 1)


def comparison(home, out, methods=USED, seeds=SEEDS, train=TRAIN, test=TEST, **changed):
    options = {k: changed.pop(k) for k in ("ratios", "held_out", "dense") if k in changed}
    return Compare(
        job(home, **changed), train, test, out, methods=methods, seeds=seeds, **{"held_out": HELD_OUT, **options}
    )


KIND = GradPruner().settings.kind  # by default, and another one
OTHER = "norm" if KIND != "norm" else "squared"


@contextlib.contextmanager
def counting():
    """Calls of `tune` and `watch` in `experiment`: their rows and recipes."""
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


def files(folder, names=("results.csv", "losses.csv", "differences.csv")):
    return {name: (folder / name).read_bytes() for name in names}


def results(folder):
    """Everything but wall time."""
    return [dataclasses.replace(result, seconds=0.0) for result in read_results(folder / "results.csv")]


def lines(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def cell(method, right, count=2, seed=0):
    return {"method": method, "count": count, "seed": seed, "right": right}


def loading(home, attention="eager"):
    return {"source": str(home / "model"), "dtype": "float32", "attention": attention, "trust_remote_code": False}


USUAL = {"probe_steps": 20, "rank": 8, "share": 1.0}


def result(method, score, seed=0, count=2):
    return Result(method, count, 0.4, seed, score, None, 1.0, 9, 4, 10, "4 5", "", 8, 1.0, 1.0, 1.0)
