"""Data in the shapes that people have, each read whole or refused with the reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from data_shapes import SHAPES

from gradpruner.data.load import load_examples
from gradpruner.errors import InvalidArgument
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


@pytest.mark.slow
def test_table_of_shapes(tmp_path, capsys):
    rows = []
    for number, shape in enumerate(SHAPES):
        (tmp_path / str(number)).mkdir()
        found = outcome(shape, tmp_path / str(number))
        read = "-" if isinstance(found, str) else str(found.counts["rows"])
        rows.append(
            {
                "input": shape.name,
                "rows": read,
                "examples": "-" if isinstance(found, str) else str(len(found)),
                "refusal": found if isinstance(found, str) else "",
            }
        )
    with capsys.disabled():
        print(f"\n{table(rows)}")


def measured(path, cache):
    made = subprocess.run(
        [sys.executable, "-c", LOAD, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_DATASETS_CACHE": str(cache)},
    )
    return json.loads(made.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "csv", "json", "parquet"])
def test_a_million_rows_take_little_memory(tmp_path, kind, capsys):
    path = tmp_path / f"a.{kind}"
    write_million(path, kind)
    first = measured(path, tmp_path / "cache")
    again = measured(path, tmp_path / "cache")
    with capsys.disabled():
        print(f"\n{kind}, {path.stat().st_size / 2**20:.0f} MiB: {first}\nfrom the cache: {again}")
    assert first["examples"] == again["examples"] == MILLION and first["first"] == again["first"]
    assert not first["torch"] and max(first["peak"], again["peak"]) < MOST_MEMORY
    assert again["seconds"] < first["seconds"] / 2


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
        file.write({"csv": "question,answer\n", "json": "[\n", "jsonl": ""}[kind])
        for n in range(MILLION):
            if kind == "csv":
                file.write(f'"{n}: {words}?",answer {n}\n')
            else:
                end = "," if kind == "json" and n < MILLION - 1 else ""
                file.write(json.dumps({"question": f"{n}: {words}?", "answer": f"answer {n}"}) + f"{end}\n")
        file.write("]" if kind == "json" else "")
