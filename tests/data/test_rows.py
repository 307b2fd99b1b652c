"""Rows on disk: the same as rows in memory, made once, found again only for the same content."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import chat_templates as templates
import numpy as np
import pytest
from chat_templates import chat_tokenizer
from disk_examples import on_disk, short
from tiny_llama import llama
from word_tokenizers import make_tokenizer

from gradpruner.data import rows as module
from gradpruner.data import rows_key
from gradpruner.data.encoder import Encoder
from gradpruner.data.examples import Example, Message
from gradpruner.data.row_facts import FACTS, fact
from gradpruner.data.rows import Rows
from gradpruner.data.rows_key import tokenizer_content
from gradpruner.data.tokens import tokenize
from gradpruner.errors import InvalidArgument
from gradpruner.run.preflight import check_rows
from gradpruner.training.evaluate import check_labels

ROOT = Path(__file__).parents[2]
EXAMPLES = [
    Example("Q", "a"),
    Example("abcdefghijklmnopqrstuvwxyz"),
    Example("0123456789", "yes"),
    Example((Message("user", "hi"),), (Message("assistant", "yo"),)),
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "gradpruner"


def files(cache):
    return sorted(path.name for path in cache.glob("*.arrow"))


@pytest.mark.parametrize("too_long", [None, "skip"])
def test_the_same_rows_as_in_memory(too_long):
    tokenizer = chat_tokenizer(templates.PHI)
    options = {"max_length": 12, "too_long": too_long}
    rows = tokenize(EXAMPLES[:3], tokenizer, **options)
    found = tokenize(on_disk(EXAMPLES[:3]), tokenizer, **options)
    assert isinstance(found, Rows) and list(found) == rows and found.counts == rows.counts
    assert list(found[1:]) == rows[1:] and found[-1] == rows[-1] and len(found[:0]) == 0
    for name in FACTS:
        assert fact(found, name).tolist() == fact(rows, name).tolist()
        assert fact(found[::-1], name).tolist() == fact(rows, name).tolist()[::-1]
    with pytest.raises(IndexError):
        found[len(rows)]


def test_conversations_on_disk():
    tokenizer = chat_tokenizer(templates.PHI)
    assert list(tokenize(on_disk(EXAMPLES), tokenizer, max_length=99)) == tokenize(EXAMPLES, tokenizer, max_length=99)


def test_no_examples():
    rows = tokenize(on_disk([]), make_tokenizer(), max_length=9)
    assert len(rows) == 0 and rows.counts.examples == 0


def test_several_processes(monkeypatch, cache):
    monkeypatch.setattr(module, "LARGE", 10)
    monkeypatch.setattr(module, "EACH", 7)
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: {0, 1})
    examples, tokenizer = [short(i) for i in range(20)], make_tokenizer()
    found = tokenize(on_disk(examples), tokenizer, max_length=99)
    assert list(found) == tokenize(examples, tokenizer, max_length=99)
    assert len(files(cache)) == 2
    broken = [*examples, Example("q", "x" * 200)]
    with pytest.raises(InvalidArgument, match=r"example 21 \(train.jsonl, line 21\)"):
        tokenize(on_disk(broken, "broken"), tokenizer, max_length=99)


def test_made_once_and_found_by_content(cache, monkeypatch):
    def tokens(fingerprint="content", *, tokenizer=None, **options):
        tokenizer = tokenizer or chat_tokenizer(templates.PHI)
        return tokenize(on_disk(EXAMPLES[:1], fingerprint), tokenizer, **{"max_length": 64, **options})

    first = tokens()
    assert len(files(cache)) == 1
    with monkeypatch.context() as patch:
        patch.setattr(module._Batch, "__call__", None)  # nothing is tokenised
        again = tokens()
        used = chat_tokenizer(templates.PHI)
        used(["a", "bc"], padding=True, truncation=True, max_length=2)  # settings of a call are no content
        assert list(again) == list(first) and again.content == first.content and list(tokens(tokenizer=used))
    others = [
        {"fingerprint": "other"},
        {"max_length": 63},
        {"train_on": "all"},
        {"too_long": "skip"},
        {"tokenizer": chat_tokenizer(templates.CHATML)},
        {"tokenizer": chat_tokenizer(templates.PHI, bos=True)},
    ]
    for count, options in enumerate(others, 2):
        tokens(**options)
        assert len(files(cache)) == count, options


def test_the_content_of_a_tokenizer():
    one, other = make_tokenizer(), make_tokenizer()
    assert tokenizer_content(one) == tokenizer_content(other)
    other.pad_token = "</s>"
    assert tokenizer_content(one) != tokenizer_content(other)
    split = make_tokenizer()
    split.split_special_tokens = True
    assert tokenizer_content(split) != tokenizer_content(one)

    class Own(type(one)):
        """Its code could do anything."""

    own = make_tokenizer()
    own.__class__ = Own
    assert tokenizer_content(own) is None


def test_other_code_makes_other_rows(monkeypatch):
    encoder = Encoder(make_tokenizer(), 64, "answer", None)
    before = rows_key.rows_key("content", encoder)
    assert before == rows_key.rows_key("content", encoder)
    monkeypatch.setattr(rows_key, "code_of_room", lambda: "other")
    assert before != rows_key.rows_key("content", encoder)


def test_a_tokenizer_that_cannot_be_identified(cache, monkeypatch):
    monkeypatch.setattr(module, "rows_key", lambda *_: None)
    rows = tokenize(on_disk(EXAMPLES[:3]), make_tokenizer(), max_length=64)
    assert list(rows) == tokenize(EXAMPLES[:3], make_tokenizer(), max_length=64) and files(cache) == []


def test_the_digest_is_of_the_content():
    def content(examples, fingerprint, **options):
        return tokenize(on_disk(examples, fingerprint), make_tokenizer(), max_length=64, **options).content

    assert content(EXAMPLES[:2], "one") == content(EXAMPLES[:2], "two")
    assert content(EXAMPLES[:2], "one") != content(EXAMPLES[1::-1], "three")
    assert content(EXAMPLES[:1], "four") != content(EXAMPLES[:1], "four", train_on="all")  # labels count


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(InvalidArgument, match=r"tokenised rows cannot be kept in .*HF_DATASETS_CACHE"):
        tokenize(on_disk(EXAMPLES[:1]), make_tokenizer(), max_length=64)


def test_checks_use_columns(monkeypatch):
    rows = tokenize(on_disk(EXAMPLES[:2]), make_tokenizer(), max_length=64)
    monkeypatch.setattr(Rows, "__getitem__", None)  # no row is read
    model = llama()
    model.resize_token_embeddings(64)
    check_labels(rows)
    with pytest.raises(InvalidArgument, match="has embeddings for 64 tokens"):
        check_rows(model, make_tokenizer(), rows)
    nothing = Rows(rows._dataset.map(lambda row: {"learned": 0}), np.arange(1))
    with pytest.raises(InvalidArgument, match="row 0 has no label"):
        check_labels(nothing)


MILLION = """
import json, resource, sys, time
import torch
sys.path[:0] = [{support!r}]
from disk_examples import DiskExamples, short
from word_tokenizers import make_tokenizer
from gradpruner.data.row_facts import fact
from gradpruner.data.tokens import tokenize
from gradpruner.training.evaluate import check_labels
from gradpruner.training.recipe import Recipe
from gradpruner.training.schedule import schedule

begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = tokenize(DiskExamples("million", short, range(1_000_000)), make_tokenizer(), max_length=64)
check_labels(rows)
ordered = schedule(rows, 31_250, Recipe(batch_size=32, group_by_length=True))
digest = ordered.digest()
for start in range(0, 32_000, 32):
    list(ordered[start : start + 32])
peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps(dict(line=rows.counts.line(), import_kib=begin, peak_kib=peaks[0], child_kib=peaks[1])))
"""


@pytest.mark.slow
def test_a_million_rows_need_little_memory(tmp_path):
    code = MILLION.format(support=str(ROOT / "tests" / "support"))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path)}
    made = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-2000:]
    result = json.loads(made.stdout.splitlines()[-1])
    print(result)
    assert result["line"].startswith("1,000,000 examples became 1,000,000 rows")
    assert result["peak_kib"] < 1.5 * 2**20 and result["child_kib"] < 1.5 * 2**20
