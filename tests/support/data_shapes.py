"""Data in the shapes that people have: each case writes files and says how they are read."""

from __future__ import annotations

import bz2
import csv
import functools
import gzip
import io
import json
import lzma
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradpruner.data.examples import Example, Message

PAIRS = [{"question": f"How much is {n} and one?", "answer": str(n + 1)} for n in range(6)]
PAIR_EXAMPLES = [Example(row["question"], row["answer"]) for row in PAIRS]
USER, BOT, SYSTEM = (functools.partial(Message, role) for role in ("user", "assistant", "system"))
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CHAT_EXAMPLE = Example((USER("Hi"),), (BOT("Hello"),))


@dataclass(frozen=True)
class Shape:
    """One case.

    Args:
        name: for the table.
        files: contents by name. Text, bytes, or a function that writes into a folder.
        expected: the examples, or words of the refusal.
        options: of `load_examples`.
        source: what is loaded. Default: the only file.
    """

    name: str
    files: dict[str, Any]
    expected: list[Example] | tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    source: str | None = None

    def write(self, folder: Path) -> str:
        """Write the files. Return the source."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if callable(content):
                content(path)
            else:
                path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(folder / (self.source if self.source is not None else next(iter(self.files))))


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def cells(rows, delimiter=",", end="\n"):
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def parquet(rows):
    import pyarrow as pa
    from pyarrow import parquet as format

    file = io.BytesIO()
    format.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def zstandard(text):
    import pyarrow as pa

    return pa.compress(text.encode(), codec="zstd", asbytes=True)


def arrow_file(path):
    import pyarrow as pa

    table = pa.Table.from_pylist(PAIRS)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


def saved(path):
    import datasets

    labels = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": labels})
    table = datasets.Dataset.from_dict({"text": ["Fine", "Poor"], "label": [1, 0]}, features=features)
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(str(path))


ALPACA = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": "Say hi.", "input": "", "output": "Hi"},
]
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "id": "a"}
CALL = [
    {"from": "human", "value": "Weather?"},
    {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bern"}}'},
    {"from": "observation", "value": "rain"},
    {"from": "gpt", "value": "It rains."},
]
ARC = {
    "question": "Which is hot?",
    "choices": {"text": ["ice", "fire"], "label": ["A", "B"]},
    "answerKey": "B",
    "id": "1",
}
MMLU = {"question": "1 + 1?", "choices": ["1", "2", "3"], "answer": 1, "subject": "sums"}
HELLASWAG = {"ctx": "He runs and", "endings": ["flies.", "falls."], "label": "1", "ind": 4}
README = """---
configs:
- config_name: easy
  data_files: [{split: train, path: easy/*.jsonl}]
- config_name: hard
  data_files: [{split: train, path: hard/*.jsonl}]
---
"""

SHAPES = [
    Shape("JSON lines", {"a.jsonl": lines(PAIRS)}, PAIR_EXAMPLES),
    Shape("ndjson, no end of line at the end", {"a.ndjson": lines(PAIRS).rstrip()}, PAIR_EXAMPLES),
    Shape("JSON list", {"a.json": json.dumps(PAIRS, indent=1)}, PAIR_EXAMPLES),
    Shape("JSON lines named .json", {"a.json": lines(PAIRS)}, PAIR_EXAMPLES),
    Shape('{"version": ..., "data": [...]}', {"a.json": json.dumps({"version": 2, "data": PAIRS})}, PAIR_EXAMPLES),
    Shape(
        "JSON object with a list among others",
        {
            "a.json": '{"about": {"a": [1]}, "n": [1, 2], "data": \n['
            + ",\n".join(map(json.dumps, PAIRS))
            + '\n], "z": ""}'
        },
        PAIR_EXAMPLES,
    ),
    Shape("JSON object, broken list", {"a.json": '{"data": [{"text": "a"},\n{"text" 1}]}'}, ("line 2", "character 9")),
    Shape("JSON object, short row", {"a.json": '{"data": [\n{"text": "a"},\n{"b": "a"}]}'}, ("row 2", "line 3")),
    Shape("JSON of one conversation", {"a.json": json.dumps({"messages": CHAT}, indent=1)}, [CHAT_EXAMPLE]),
    Shape("JSON list named .jsonl", {"a.jsonl": json.dumps(PAIRS, indent=1)}, ("line 1", "ends in .json")),
    Shape("JSON with two lists", {"a.json": json.dumps({"a": PAIRS, "b": PAIRS})}, ("several: a, b",)),
    Shape("JSON list with a comma too much", {"a.json": '[{"text": "a"},\n]'}, ("line 2", "broken JSON")),
    Shape("JSON list with something after it", {"a.json": '[{"text": "a"}]\n7'}, ("line 2", "Extra data")),
    Shape("CSV", {"a.csv": cells(PAIRS)}, PAIR_EXAMPLES),
    Shape("CSV with CRLF", {"a.csv": cells(PAIRS, end="\r\n")}, PAIR_EXAMPLES),
    Shape("CSV with a byte order mark", {"a.csv": b"\xef\xbb\xbf" + cells(PAIRS).encode()}, PAIR_EXAMPLES),
    Shape(
        "CSV with new lines in cells",
        {"a.csv": 'question,answer\n"two\n\nlines",a\nq,b\n'},
        [Example("two\n\nlines", "a"), Example("q", "b")],
    ),
    Shape(
        "CSV with new lines in cells, then a short row",
        {"a.csv": 'question,answer\n"two\n\nlines",a\nq\n'},
        ("a.csv, line 5", "2 cells"),
    ),
    Shape("CSV with an empty cell", {"a.csv": "question,answer\nq,a\nq,\n"}, ("row 2", "line 3", "empty answer")),
    Shape(
        "CSV with an empty cell, skipped",
        {"a.csv": "question,answer\nq,a\nr,\ns,b\n"},
        [Example("q", "a"), Example("s", "b")],
        {"skip_bad_rows": 0.4},
    ),
    Shape("CSV with a cell of 200,000 characters", {"a.csv": f"text\n{'x' * 200_000}\n"}, [Example("x" * 200_000)]),
    Shape("CSV with ;", {"a.csv": cells(PAIRS, ";")}, ("';'", "delimiter")),
    Shape("CSV with ;, told", {"a.csv": cells(PAIRS, ";")}, PAIR_EXAMPLES, {"delimiter": ";"}),
    Shape("CSV with a name twice", {"a.csv": "a,b,a\n1,2,3\n"}, ("'a' twice",)),
    Shape("CSV with spaces in its names", {"a.csv": "Question, Answer\nq,a\n"}, ("rename", "'question', 'answer'")),
    Shape("CSV without names", {"a.csv": "one,two\nthree,four\n"}, ("'one', 'two'", "begins with the names")),
    Shape("TSV", {"a.tsv": cells(PAIRS, "\t")}, PAIR_EXAMPLES),
    Shape("Latin-1", {"a.csv": "text\nfine\ncafé\n".encode("latin-1")}, ("line 3", "not UTF-8", "encoding")),
    Shape(
        "Latin-1, told",
        {"a.csv": "text\nfine\ncafé\n".encode("latin-1")},
        [Example("fine"), Example("café")],
        {"encoding": "latin-1"},
    ),
    Shape("UTF-16", {"a.jsonl": lines(PAIRS).encode("utf-16")}, ("encoding utf-16",)),
    Shape("UTF-16, told", {"a.jsonl": lines(PAIRS).encode("utf-16")}, PAIR_EXAMPLES, {"encoding": "utf-16"}),
    Shape("parquet", {"a.parquet": parquet(PAIRS)}, PAIR_EXAMPLES),
    Shape("parquet, cut off", {"a.parquet": parquet(PAIRS)[:-20]}, ("a.parquet", "broken")),
    Shape("Arrow file", {"a.arrow": arrow_file}, PAIR_EXAMPLES),
    Shape("gzip", {"a.jsonl.gz": gzip.compress(lines(PAIRS).encode())}, PAIR_EXAMPLES),
    Shape("gzip, cut off", {"a.jsonl.gz": gzip.compress(lines(PAIRS).encode())[:-12]}, ("broken .gz",)),
    Shape("gzip that is none", {"a.csv.gz": cells(PAIRS)}, ("broken .gz",)),
    Shape("Zstandard", {"a.jsonl.zst": zstandard(lines(PAIRS))}, PAIR_EXAMPLES),
    Shape("Zstandard, cut off", {"a.jsonl.zst": zstandard(lines(PAIRS))[:-9]}, ("broken .zst",)),
    Shape("bzip2, cut off", {"a.jsonl.bz2": bz2.compress(lines(PAIRS).encode())[:-9]}, ("broken .bz2",)),
    Shape("xz, cut off", {"a.jsonl.xz": lzma.compress(lines(PAIRS).encode())[:-9]}, ("broken .xz",)),
    Shape("xz that is none", {"a.jsonl.xz": lines(PAIRS)}, ("broken .xz",)),
    Shape("xz", {"a.csv.xz": lzma.compress(cells(PAIRS).encode())}, PAIR_EXAMPLES),
    Shape("bzip2", {"a.json.bz2": bz2.compress(json.dumps(PAIRS).encode())}, PAIR_EXAMPLES),
    Shape("parquet in gzip", {"a.parquet.gz": gzip.compress(parquet(PAIRS))}, PAIR_EXAMPLES),
    Shape("text, a file", {"a.txt": "One.\nTwo.\n\nThree.\n"}, [Example("One.\nTwo.\n\nThree.\n")]),
    Shape(
        "text, by line",
        {"a.txt": "One.\r\nTwo.\r\n\r\nThree."},
        [Example("One."), Example("Two."), Example("Three.")],
        {"text_rows": "line"},
    ),
    Shape(
        "text, by paragraph",
        {"a.txt": "One.\nTwo.\n\n\nThree.\n"},
        [Example("One.\nTwo."), Example("Three.")],
        {"text_rows": "paragraph"},
    ),
    Shape(
        "pattern",
        {"x/a-1.jsonl": lines(PAIRS[:2]), "x/a-0.jsonl": lines(PAIRS[2:])},
        PAIR_EXAMPLES[2:] + PAIR_EXAMPLES[:2],
        source="x/a-*.jsonl",
    ),
    Shape("pattern without a file", {"a.jsonl": ""}, ("fits no file",), source="b*.jsonl"),
    Shape(
        "folder of shards", {"x/b.jsonl": lines(PAIRS[2:]), "x/a.jsonl": lines(PAIRS[:2])}, PAIR_EXAMPLES, source="x"
    ),
    Shape(
        "folder of a hub data set",
        {"x/data/train-0.parquet": parquet(PAIRS), "x/data/test-0.parquet": parquet(PAIRS[:1]), "x/README.md": "# X\n"},
        PAIR_EXAMPLES[:1],
        {"split": "test"},
        "x",
    ),
    Shape(
        "folder with configurations",
        {"x/README.md": README, "x/easy/a.jsonl": lines(PAIRS[:1]), "x/hard/a.jsonl": lines(PAIRS[1:])},
        PAIR_EXAMPLES[1:],
        {"config": "hard"},
        "x",
    ),
    Shape(
        "folder with two types", {"x/a.jsonl": lines(PAIRS), "x/a.csv": cells(PAIRS)}, ("several types",), source="x"
    ),
    Shape("save_to_disk, class labels", {"x": saved}, [Example("Fine", "good"), Example("Poor", "bad")]),
    Shape("save_to_disk, another split", {"x": saved}, [Example("Poor", "bad")], {"split": "test"}),
    Shape("save_to_disk, a split that is none", {"x": saved}, ("split", "'dev'", "train, test"), {"split": "dev"}),
    Shape("slice of a split", {"a.jsonl": lines(PAIRS)}, PAIR_EXAMPLES[:3], {"split": "train[:50%]"}),
    Shape("prompt and completion", {"a.jsonl": lines([{"prompt": "p", "completion": "c"}])}, [Example("p", "c")]),
    Shape(
        "prompt and completion of messages",
        {"a.jsonl": lines([{"prompt": CHAT[:1], "completion": CHAT[1:]}])},
        [CHAT_EXAMPLE],
    ),
    Shape("messages", {"a.jsonl": lines([{"messages": CHAT, "id": 3}])}, [CHAT_EXAMPLE]),
    Shape("messages in parquet", {"a.parquet": parquet([{"messages": CHAT}])}, [CHAT_EXAMPLE]),
    Shape(
        "messages with a system message given",
        {"a.jsonl": lines([{"messages": CHAT}])},
        [Example((SYSTEM("Be kind."), USER("Hi")), (BOT("Hello"),))],
        {"system": "Be kind."},
    ),
    Shape(
        "messages with an image",
        {"a.jsonl": lines([{"messages": [{"role": "user", "content": [{"type": "image"}]}, CHAT[1]]}])},
        ("message 1", "'image'"),
    ),
    Shape(
        "messages without the assistant", {"a.jsonl": lines([{"messages": CHAT[:1]}])}, ("no turn of the assistant",)
    ),
    Shape(
        "messages beside a pair", {"a.jsonl": lines([{"messages": CHAT, **PAIRS[0]}])}, ("several formats", "format")
    ),
    Shape("ShareGPT", {"a.json": json.dumps([SHAREGPT])}, [CHAT_EXAMPLE]),
    Shape(
        "ShareGPT with a call and tools",
        {"a.json": json.dumps([{"conversations": CALL, "tools": '[{"name": "weather"}]'}])},
        [
            Example(
                (USER("Weather?"),),
                (
                    Message(
                        "assistant",
                        "",
                        '{"tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": '
                        '{"city": "Bern"}}}]}',
                    ),
                    Message("tool", "rain"),
                    BOT("It rains."),
                ),
                '[{"name": "weather"}]',
            )
        ],
    ),
    Shape(
        "ShareGPT, unknown role",
        {"a.json": json.dumps([{"conversations": [{"from": "narrator", "value": "x"}]}])},
        ("'narrator'", "human"),
    ),
    Shape("Alpaca", {"a.json": json.dumps(ALPACA)}, [Example("Add.\n1 and 2", "3"), Example("Say hi.", "Hi")]),
    Shape(
        "Alpaca with system and history",
        {"a.json": json.dumps([{**ALPACA[1], "system": "Be brief.", "history": [["Hi", "Hello"]]}])},
        [Example((SYSTEM("Be brief."), USER("Hi")), (BOT("Hello"), USER("Say hi."), BOT("Hi")))],
    ),
    Shape(
        "Alpaca, as chats",
        {"a.json": json.dumps(ALPACA[1:])},
        [Example((USER("Say hi."),), (BOT("Hi"),))],
        {"as_chat": True},
    ),
    Shape(
        "multiple choice, ARC",
        {"a.jsonl": lines([ARC])},
        [Example("Which is hot?\nA. ice\nB. fire\nAnswer:", "B")],
    ),
    Shape("multiple choice, MMLU", {"a.jsonl": lines([MMLU])}, [Example("1 + 1?\nA. 1\nB. 2\nC. 3\nAnswer:", "B")]),
    Shape(
        "multiple choice, HellaSwag",
        {"a.jsonl": lines([HELLASWAG])},
        [Example("He runs and\nA. flies.\nB. falls.\nAnswer:", "B")],
    ),
    Shape(
        "multiple choice, columns A and B",
        {"a.csv": "question,A,B,answer\nHot?,ice,fire,B\n"},
        [Example("Hot?\nA. ice\nB. fire\nAnswer:", "B")],
    ),
    Shape("multiple choice, no such choice", {"a.jsonl": lines([{**MMLU, "answer": 3}])}, ("3 fits no choice",)),
    Shape("multiple choice, unclear", {"a.jsonl": lines([{**MMLU, "answer": "2"}])}, ("fits several choices",)),
    Shape(
        "question and answer with context", {"a.jsonl": lines([{**PAIRS[0], "context": "c"}])}, ("'context'", "lost")
    ),
    Shape(
        "the same with a template",
        {"a.jsonl": lines([{**PAIRS[0], "context": "c"}])},
        [Example("c How much is 0 and one?", "1")],
        {"prompt": "{context} {question}", "answer": "{answer}"},
    ),
    Shape("tokens", {"a.jsonl": lines([{"input_ids": [1], "labels": [1]}])}, ("tokens", "expected the text")),
    Shape(
        "messages, roles with capitals",
        {"a.jsonl": lines([{"messages": [{"role": "User", "content": "a"}, {"role": "Bot", "content": "b"}]}])},
        ("'User', 'Bot'", "expected 'assistant'"),
    ),
    Shape(
        "messages, the user's marked as not learned",
        {"a.jsonl": lines([{"messages": [{**CHAT[0], "train": False}, {**CHAT[1], "train": True}]}])},
        [CHAT_EXAMPLE],
    ),
    Shape(
        "messages, the assistant's marked as not learned",
        {"a.jsonl": lines([{"messages": [CHAT[0], {**CHAT[1], "weight": 0}]}])},
        ("message 2", "not to be learned"),
    ),
    Shape("messages, judged", {"a.jsonl": lines([{"messages": CHAT, "label": False}])}, ("'label'", "preference data")),
    Shape("Alpaca, judged", {"a.jsonl": lines([{**ALPACA[0], "kto_tag": True}])}, ("'kto_tag'", "preference data")),
    Shape("a label True or False", {"a.jsonl": lines([{"text": "Fine", "label": True}])}, [Example("Fine", "True")]),
    Shape("preferences", {"a.jsonl": lines([{"prompt": "p", "chosen": "a", "rejected": "b"}])}, ("preference data",)),
    Shape(
        "one broken row",
        {"a.jsonl": lines(PAIRS[:3]) + "{broken\n" + lines(PAIRS[3:])},
        ("a.jsonl, line 4", "broken JSON"),
    ),
    Shape(
        "one broken row, skipped",
        {"a.jsonl": lines(PAIRS[:3]) + "{broken\n" + lines(PAIRS[3:])},
        PAIR_EXAMPLES,
        {"skip_bad_rows": 0.2},
    ),
    Shape(
        "two broken rows, too many",
        {"a.jsonl": "7\n" + lines(PAIRS[:3]) + "{broken\n" + lines(PAIRS[3:])},
        ("2 of 8 rows are bad", "line 1", "line 5"),
        {"skip_bad_rows": 0.2},
    ),
    Shape("an empty file", {"a.jsonl": ""}, ("no rows",)),
    Shape("NaN in a cell", {"a.jsonl": '{"question": "q", "answer": NaN}'}, ("row 1", "'answer'", "no value")),
]
