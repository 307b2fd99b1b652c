"""What training and generation cost, measured in processes of their own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_comparisons import BATCH, LAYERS, TRAIN, comparison, lines, loading
from transformers import AutoModelForCausalLM, LlamaConfig
from word_tokenizers import make_tokenizer

import gradpruner
from gradpruner.compare import costs, outputs
from gradpruner.compare.results import Cost
from gradpruner.data.collator import Collator
from gradpruner.data.tokens import tokenize
from gradpruner.methods import GradPruner
from gradpruner.model.loss import IGNORED
from gradpruner.plan import Plan
from gradpruner.training.recipe import Recipe
from gradpruner.training.schedule import schedule


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


@pytest.mark.slow
@pytest.mark.in_ci
def test_costs_are_measured_once_a_size(base, copied, home, monkeypatch):
    seen = {}

    def measure(loading, plans, rows, recipe, rank_factor, beside):
        assert beside == copied and (copied / "report.html").is_file()  # what is there already is not lost by a failure
        assert rank_factor == GradPruner().settings.rank_factor
        seen.update(loading=loading, plans=plans, rows=rows, recipe=recipe)
        return [
            Cost(6 - (len(p.removed) if p else 0), len(p.removed) if p else 0, 1.0, 2, 3.0, 4, 5, 6.0) for p in plans
        ]

    monkeypatch.setattr(outputs, "measure", measure)
    made = comparison(home, copied)
    outputs.write(made, costs=True)
    assert [p if p is None else len(p.removed) for p in seen["plans"]] == [None, 2]
    assert seen["loading"]["source"] == str(home / "model") and seen["rows"] == base[2]["tune"][0]["rows"]
    assert len(lines(copied / "costs.csv")) == 2
    monkeypatch.undo()
    before = (copied / "costs.csv").read_bytes()
    outputs.write(made, costs=False)  # what was measured before is shown again
    assert (copied / "costs.csv").read_bytes() == before and "costs" in (copied / "report.html").read_text().lower()


@pytest.mark.slow
def test_costs_are_measured_in_one_process_under_a_launcher(home, tmp_path, monkeypatch):
    """The processes that measure inherit the launcher's variables, and are no part of its training."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    (found,) = costs.measure(
        loading(home, "eager"),
        [None],
        schedule(tokenize(TRAIN, make_tokenizer(), max_length=64), 8, Recipe(batch_size=2, rank=2)),
        Recipe(batch_size=2, rank=2),
        beside=tmp_path,
        rounds=1,
    )
    assert found.layers == LAYERS and found.train_step_seconds > 0
