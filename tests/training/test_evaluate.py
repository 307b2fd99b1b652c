from __future__ import annotations

import json
import math
import random
import sys
import types
from dataclasses import FrozenInstanceError

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gradpruner.data.collator import Collator
from gradpruner.data.examples import Example
from gradpruner.data.tokens import tokenize
from gradpruner.errors import InvalidArgument
from gradpruner.model import loss
from gradpruner.training import evaluate
from gradpruner.training.evaluate import (
    Evaluation,
    answers,
    exact_match,
    exact_matches,
    generation_speed,
    macro_f1,
    perplexity,
    rouge_l,
)

LEARNED = 8  # rows the model has seen; it knows nothing of the others


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, after the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["</s>", "<pad>", *alphabet])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def rows(tokenizer):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 5))) for _ in range(2 * LEARNED)]
    examples = [Example("x" * rng.randint(0, 9) + f"{number}:", word) for number, word in enumerate(words)]
    return tokenize(examples, tokenizer, max_length=64)


@pytest.fixture(scope="module")
def collate(tokenizer):
    return Collator(tokenizer)


@pytest.fixture(scope="module")
def model(rows, collate):
    """A tiny Llama that has learned the first rows by heart."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
        attention_dropout=0.5,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = collate(rows[:LEARNED])
    model.eval()  # without dropout it learns in a few steps
    for _ in range(60):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1
    return model


def generated(model, row) -> list[int]:
    """What greedy generation really writes after one row's prompt, on its own and without padding."""
    length = row["labels"].count(-100)
    prompt = torch.tensor([row["input_ids"][:length]])
    out = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=len(row["input_ids"]) - length,
        do_sample=False,
    )
    return out[0, length:].tolist()


def by_generation(model, rows) -> list[bool]:
    return [generated(model, row) == [t for t in row["labels"] if t != -100] for row in rows]


def without_logits_to_keep(model, monkeypatch) -> None:
    forward = model.forward

    def plain(input_ids, attention_mask, use_cache):
        return forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    monkeypatch.setattr(model, "forward", plain)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_exact_match_is_what_generation_yields(model, rows, collate, batch_size):
    expected = by_generation(model, rows)
    assert expected[:LEARNED] == [True] * LEARNED and not all(expected)
    assert exact_matches(model, rows, collate=collate, batch_size=batch_size) == expected
    share = exact_match(model, rows, collate=collate, batch_size=batch_size)
    assert share == sum(expected) / len(expected)


def test_a_single_wrong_token_or_a_missing_end_is_a_miss(model, rows, collate):
    good = max(rows[:LEARNED], key=lambda row: len(row["labels"]) - row["labels"].count(-100))
    start = good["labels"].count(-100)
    variants = [good]
    for position in range(start, len(good["labels"])):
        ids = list(good["input_ids"])
        ids[position] = 100
        variants.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    # the answer goes on where the model would stop
    variants.append({"input_ids": [*good["input_ids"][:-1], 100, 0], "labels": [*good["labels"][:-1], 100, 0]})
    result = exact_matches(model, variants, collate=collate, batch_size=4)
    assert result == [True] + [False] * (len(variants) - 1)


def test_models_without_logits_to_keep(model, rows, collate, monkeypatch):
    expected = exact_matches(model, rows, collate=collate, batch_size=4)
    loss = perplexity(model, rows, collate=collate, batch_size=4)
    without_logits_to_keep(model, monkeypatch)
    assert exact_matches(model, rows, collate=collate, batch_size=4) == expected
    assert perplexity(model, rows, collate=collate, batch_size=4) == pytest.approx(loss, rel=1e-5)


def test_logits_are_computed_only_where_needed_also_inside_peft(model, rows, collate):
    expected = exact_matches(model, rows, collate=collate, batch_size=4)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    seen = []
    hook = model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    try:
        assert exact_matches(wrapped, rows[:1], collate=collate, batch_size=4) == expected[:1]
    finally:
        hook.remove()
        wrapped.unload()
    assert seen == [len(rows[0]["labels"]) - rows[0]["labels"].count(-100)]


def naive_perplexity(model, rows) -> float:
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].double()
        labels = torch.tensor(row["labels"][1:])
        losses = -logits.log_softmax(-1)[labels != -100, labels[labels != -100]]
        total += float(losses.sum())
        count += len(losses)
    return math.exp(total / count)


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_perplexity(model, rows, collate, tokenizer, batch_size, monkeypatch):
    plain = tokenize([Example("abc abc", ""), Example("once upon a time", "")], tokenizer, max_length=64)
    for data in (rows, plain, rows + plain):
        found = perplexity(model, data, collate=collate, batch_size=batch_size)
        assert found == pytest.approx(naive_perplexity(model, data), rel=1e-5)
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 1000)
    assert perplexity(model, plain, collate=collate, batch_size=batch_size) == pytest.approx(
        naive_perplexity(model, plain), rel=1e-5
    )


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_answers_tell_all_that_the_others_do(model, rows, collate, tokenizer, batch_size):
    plain = tokenize([Example("abc abc", ""), Example("once upon a time", "")], tokenizer, max_length=64)
    data = [*rows[: LEARNED + 3], *plain, *rows[LEARNED + 3 :]]
    found = answers(model, data, collate=collate, batch_size=batch_size)
    right = [answer.right for answer in found]
    assert right == exact_matches(model, data, collate=collate, batch_size=batch_size) and 0 < sum(right) < len(right)
    whole = math.exp(sum(answer.loss for answer in found) / sum(answer.tokens for answer in found))
    assert whole == pytest.approx(perplexity(model, data, collate=collate, batch_size=batch_size), rel=1e-6)
    for answer, row in zip(found, data, strict=True):
        wanted = [label for label in row["labels"][1:] if label != -100]
        assert math.exp(answer.loss / answer.tokens) == pytest.approx(naive_perplexity(model, [row]), rel=1e-5)
        with torch.no_grad():
            best = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].argmax(-1).tolist()
        said = [token for token, label in zip(best, row["labels"][1:], strict=True) if label != -100]
        assert answer.tokens == len(wanted) and answer.predicted == tuple(said) and answer.right == (said == wanted)


def test_answers_without_rows_are_refused(model, collate):
    with pytest.raises(InvalidArgument, match="rows is empty"):
        answers(model, [], collate=collate, batch_size=4)


def confusion_f1(said, truth):
    """Macro-F1 over the true classes by a matrix of counts, a column more for what is none of them."""
    classes = list(dict.fromkeys(truth))
    matrix = [[0] * (len(classes) + 1) for _ in classes]
    for s, t in zip(said, truth, strict=True):
        matrix[classes.index(t)][classes.index(s) if s in classes else len(classes)] += 1
    scores = []
    for i in range(len(classes)):
        hits, named, real = matrix[i][i], sum(row[i] for row in matrix), sum(matrix[i])
        precision, recall = hits / named if named else 0.0, hits / real
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    return sum(scores) / len(scores)


def test_macro_f1_by_hand():
    truth = ["a", "a", "a", "b", "b", "c"]
    said = ["a", "a", "b", "b", "x", "a"]
    # a: precision 2/3, recall 2/3; b: precision 1/2, recall 1/2; c is never said
    assert macro_f1(said, truth) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert macro_f1(truth, truth) == 1 and macro_f1(["x"] * 6, truth) == 0
    # always the largest class: half of the answers, but only one class of three
    assert macro_f1(["a"] * 6, truth) == pytest.approx((2 * 3 / 9) / 3)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_macro_f1_by_a_confusion_matrix(classes):
    rng = random.Random(classes)
    for _ in range(30):
        truth = [(rng.randrange(classes), 5) for _ in range(40)]
        said = [t if rng.random() < 0.5 else (rng.randrange(classes + 2), 5) for t in truth]
        assert macro_f1(said, truth) == pytest.approx(confusion_f1(said, truth))
    with pytest.raises(ValueError):
        macro_f1(["a"], ["a", "b"])


def test_perplexity_beyond_floats_is_infinite(model, rows, collate, monkeypatch):
    monkeypatch.setattr(evaluate, "cross_entropy_sum", lambda logits, labels: 1e6)
    assert perplexity(model, rows, collate=collate, batch_size=4) == math.inf


def test_modes_are_restored_and_dropout_is_off(model, rows, collate):
    expected = perplexity(model, rows, collate=collate, batch_size=4)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    try:
        assert perplexity(model, rows, collate=collate, batch_size=4) == expected
        assert [module.training for module in model.modules()] == modes
        with pytest.raises(IndexError):
            broken = [{"input_ids": [10**6, 2], "labels": [-100, 2]}]
            perplexity(model, broken, collate=collate, batch_size=4)
        assert [module.training for module in model.modules()] == modes
    finally:
        model.eval()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_refusals(model, rows, collate, tokenizer, monkeypatch):
    with pytest.raises(InvalidArgument, match="rows is empty"):
        exact_match(model, [], collate=collate, batch_size=4)
    with pytest.raises(InvalidArgument, match="batch_size is 0"):
        perplexity(model, rows, collate=collate, batch_size=0)
    unlabelled = {"input_ids": [5, 6], "labels": [5, -100]}
    with pytest.raises(InvalidArgument, match="row 1 has no label"):
        exact_match(model, [rows[0], unlabelled], collate=collate, batch_size=4)
    with pytest.raises(InvalidArgument, match="new_tokens is 0"):
        generation_speed(model, tokenizer, new_tokens=0)


class StubScorer:
    """Stands in for rouge-score's: 1 for the same text, else 0."""

    def __init__(self, kinds):
        assert kinds == ["rougeL"]

    def score(self, target, prediction):
        assert "</s>" not in target + prediction
        return {"rougeL": types.SimpleNamespace(fmeasure=float(target == prediction))}


@pytest.mark.parametrize("batch_size", [1, 5])
def test_rouge_l_scores_what_is_generated_from_each_prompt(model, rows, tokenizer, batch_size, monkeypatch):
    module = types.SimpleNamespace(RougeScorer=StubScorer)
    monkeypatch.setitem(sys.modules, "rouge_score", types.ModuleType("rouge_score"))
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", module)
    expected = sum(by_generation(model, rows)) / len(rows)
    found = rouge_l(model, rows, tokenizer, max_new_tokens=8, batch_size=batch_size)
    assert found == pytest.approx(expected)
    with pytest.raises(InvalidArgument, match="row 0 has no prompt"):
        plain = tokenize([Example("text", "")], tokenizer, max_length=9)
        rouge_l(model, plain, tokenizer, max_new_tokens=8, batch_size=1)


def test_rouge_l_says_what_to_install(model, rows, tokenizer, monkeypatch):
    for name in ("rouge_score", "rouge_score.rouge_scorer"):  # another test may have imported it
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InvalidArgument, match=r"pip install gradpruner\[rouge\]"):
        rouge_l(model, rows, tokenizer, max_new_tokens=8, batch_size=4)


def test_generation_speed_counts_the_tokens_it_generates(model, tokenizer, monkeypatch):
    lengths = []
    generate = model.generate

    def counting(**options):
        out = generate(**options)
        lengths.append(out.shape[1] - options["input_ids"].shape[1])
        return out

    # a clock of one second a look: each run takes one second
    ticks = iter(range(100))
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(model, "generate", counting)
    assert generation_speed(model, tokenizer, new_tokens=12) == 12
    assert lengths == [8, 12, 12, 12]  # one run to warm up, three that count
    lengths.clear()
    assert generation_speed(model, tokenizer, new_tokens=4, runs=1) == 4 and lengths == [4, 4]


def test_evaluation_is_plain_data():
    evaluation = Evaluation(exact_match=0.5, perplexity=None, rouge_l=None, examples=4)
    assert json.loads(json.dumps(evaluation.to_dict())) == {
        "exact_match": 0.5,
        "perplexity": None,
        "rouge_l": None,
        "examples": 4,
    }
    with pytest.raises(FrozenInstanceError):
        evaluation.examples = 5
