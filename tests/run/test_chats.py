"""Conversations from training to evaluation."""

from __future__ import annotations

import logging

import chat_templates as templates
import pytest
import torch
from chat_templates import chat_tokenizer
from disk_examples import on_disk
from transformers import AutoModelForCausalLM, LlamaConfig

from gradpruner.data.examples import Example, Message
from gradpruner.data.tokens import tokenize
from gradpruner.errors import InvalidArgument
from gradpruner.run.job import Job
from gradpruner.run.preflight import check_examples
from gradpruner.run.stages import measure, tune
from gradpruner.training.evaluate import rouge_l
from gradpruner.training.recipe import Recipe
from gradpruner.training.schedule import schedule


def small(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return AutoModelForCausalLM.from_config(config)


def conversation(*contents):
    messages = [Message("user" if i % 2 == 0 else "assistant", content) for i, content in enumerate(contents)]
    return Example((messages[0],), tuple(messages[1:]))


KNOWN = conversation("hi", "yo", "bye", "ciao")
UNKNOWN = conversation("hi", "yo", "bye", "away")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A model that has learned one conversation by heart, from rows on disk, and its tokenizer."""
    import datasets

    tokenizer = chat_tokenizer(templates.LLAMA)
    model = small(tokenizer)
    recipe = Recipe(batch_size=1, learning_rate=1e-2, rank=0, weight_decay=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        rows = tokenize(on_disk([KNOWN]), tokenizer, max_length=64)
        return *tune(model, tokenizer, schedule(rows, 40, recipe), recipe, quiet=True), tokenizer


def test_exact_match_is_that_of_greedy_generation(tuned):
    model, training, tokenizer = tuned
    assert training.losses[-1] < 0.2
    options = {"max_length": 64, "train_on": "answer", "batch_size": 2}
    assert measure(model, tokenizer, [KNOWN, UNKNOWN], **options).exact_match == 0.5
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    messages.append({"role": "user", "content": "bye"})
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    made = model.generate(prompt, max_new_tokens=5, do_sample=False)[0, prompt.shape[1] :]
    assert tokenizer.decode(made) == "ciao<|eot_id|>"


def test_perplexity_is_of_what_is_trained(tuned):
    model, _, tokenizer = tuned
    found = {}
    for train_on in ("answer", "all"):
        evaluation = measure(model, tokenizer, [KNOWN], max_length=64, train_on=train_on, batch_size=2)
        (row,) = tokenize([KNOWN], tokenizer, max_length=64, train_on=train_on)
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
        assert evaluation.perplexity == pytest.approx(float(loss.exp()), rel=1e-4)
        found[train_on] = evaluation.perplexity
    assert found["answer"] < 1.3 < found["all"]


def test_rouge_stops_at_the_end_of_the_turn(tuned):
    pytest.importorskip("rouge_score")
    model, _, tokenizer = tuned
    rows = tokenize([KNOWN], tokenizer, max_length=64, train_on="last")
    assert rouge_l(model, rows, tokenizer, max_new_tokens=20, batch_size=1) == 1.0


def test_what_was_lost_is_said(caplog):
    tokenizer = chat_tokenizer(templates.LLAMA)
    model = small(tokenizer)
    longer = conversation("x" * 40, "y", "hi", "yo", "bye", "ciao")
    job = Job("model", 4, Recipe(batch_size=2), max_length=60, probe_steps=1)
    with caplog.at_level(logging.INFO, logger="gradpruner"):
        check_examples(job, model, tokenizer, {"training": [KNOWN, longer], "test": [KNOWN]})
    assert "training: 2 examples became 2 rows" in caplog.text and "1 too long and cut by" in caplog.text
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]  # only what loses tokens warns
    assert "of what a step computes is padding" in caplog.text and "none is too long" in caplog.text
    job = Job("model", 4, Recipe(batch_size=2), max_length=10, probe_steps=1, too_long="skip")
    with pytest.raises(InvalidArgument, match="training examples: none is left; 1 examples became 0 rows"):
        check_examples(job, model, tokenizer, {"training": [KNOWN]})
