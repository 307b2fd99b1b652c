"""Tables of examples, their cache, their digest, and the copies that are kept apart."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random

import datasets
import pytest
from packaging.version import Version

from gradpruner.cli import data_options
from gradpruner.cli.main import build_parser
from gradpruner.data import load
from gradpruner.data.copies import without_copies
from gradpruner.data.examples import Example, Message, decoded, digest_of_examples, encoded, split_examples
from gradpruner.data.load import load_examples
from gradpruner.data.sources import test_split_of as part_for_tests  # pytest collects names that begin with test
from gradpruner.errors import InvalidArgument

EXAMPLES = [Example(f"q{n}", f"a{n}") for n in range(20)]
CHAT = Example((Message("user", "Hi", '{"name": "Ann"}'),), (Message("assistant", "Ho"),), '[{"name": "t"}]')


def write(path, examples):
    path.write_text("".join(json.dumps({"question": e.prompt, "answer": e.answer}) + "\n" for e in examples))
    return path


@pytest.fixture
def table(tmp_path):
    return load_examples(write(tmp_path / "a.jsonl", EXAMPLES))


def test_a_table_is_a_sequence_of_examples(table):
    assert len(table) == 20 and table == EXAMPLES and [*EXAMPLES] == table and table != EXAMPLES[1:]
    assert table[3] == EXAMPLES[3] and table[-1] == EXAMPLES[-1]
    assert table[2:9:3] == EXAMPLES[2:9:3] and table[::-1][:2] == EXAMPLES[:-3:-1]
    assert table.select([5, 5, 1]) == [EXAMPLES[5], EXAMPLES[5], EXAMPLES[1]]
    assert table.where(3).endswith("a.jsonl (line 4)") and table[10:].where(0).startswith("row 11 of ")
    assert list(table.dataset.column_names) == ["kind", "prompt", "answer", "tools", "where"]
    assert table[4:6].dataset["prompt"][:] == ["q4", "q5"]
    assert pickle.loads(pickle.dumps(table[4:6])) == EXAMPLES[4:6]
    with pytest.raises(IndexError):
        table[20]


def test_a_table_is_shuffled_as_a_list_is(table):
    expected = list(EXAMPLES)
    random.Random(7).shuffle(expected)
    assert table.shuffled(7) == expected


def test_the_digest_is_that_of_the_content(table):
    digest = digest_of_examples(EXAMPLES)
    assert digest == table.fingerprint == digest_of_examples(table[:5], EXAMPLES[5:])
    assert digest != digest_of_examples(EXAMPLES[::-1])
    assert digest_of_examples([Example("ab", "c")]) != digest_of_examples([Example("a", "bc")])
    assert digest_of_examples([Example("[]", "")]) != digest_of_examples([Example((), ())])


def test_an_example_as_four_texts():
    for example in (EXAMPLES[0], CHAT, Example("text")):
        assert decoded(encoded(example)) == example and hash(example) == hash(decoded(encoded(example)))
    with pytest.raises(InvalidArgument, match="differ in kind"):
        encoded(Example("q", (Message("assistant", "a"),)))


def cached(monkeypatch, folder):
    monkeypatch.setattr("gradpruner.data.sources.LARGE_FILE", 1)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    written = []
    write_table = load._write

    def counted(*arguments):
        written.append(1)
        return write_table(*arguments)

    monkeypatch.setattr(load, "_write", counted)
    return written


def test_a_large_file_is_read_once(tmp_path, monkeypatch, caplog):
    written = cached(monkeypatch, tmp_path / "cache")
    path = write(tmp_path / "a.jsonl", EXAMPLES)
    path.write_text(path.read_text() + '{"question": "q", "answer": "", "url": "u"}\n')
    with pytest.raises(InvalidArgument, match=r"row 21 of .*a\.jsonl \(line 21\) has an empty answer"):
        load_examples(path)
    first = load_examples(path, skip_bad_rows=0.1)
    with caplog.at_level(logging.INFO):
        assert load_examples(path, skip_bad_rows=0.1) == first == EXAMPLES
    assert (
        "skipped 1 of 21 rows" in caplog.text and "1 empty skipped" in caplog.text and "not used: 'url'" in caplog.text
    )
    assert first.counts == {"files": 1, "rows": 21, "kept": 20, "bad": 0, "empty": 1}
    assert first.dataset.cache_files and len(written) == 2  # the refusal, and the first reading
    before = path.stat()
    path.write_text(path.read_text().replace("q7", "Q7"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # the same length and time, other bytes
    assert load_examples(path, skip_bad_rows=0.1)[7].prompt == "Q7"
    assert load_examples(path, prompt="{question}", skip_bad_rows=0.1)[0] == Example("q0")
    assert len(written) == 4


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    cached(monkeypatch, tmp_path / "cache")
    (tmp_path / "cache").write_text("a file where the folder would be")
    with pytest.raises(InvalidArgument, match="HF_DATASETS_CACHE"):
        load_examples(write(tmp_path / "a.jsonl", EXAMPLES))


def test_several_sources_are_joined(tmp_path, caplog):
    one, two = write(tmp_path / "a.jsonl", EXAMPLES[:3]), tmp_path / "b.csv"
    two.write_text("text,label\nx,y\n")
    expected = [*EXAMPLES[:3], Example("x", "y")]
    with caplog.at_level(logging.INFO):
        joined = load_examples([one, str(two)])
    assert joined == expected == load_examples(f"{one}, {two}")
    assert joined.sets == ((str(one), 3), (str(two), 1)) and joined.counts["rows"] == 4
    assert "data: 4 of 4 rows kept, from 2 files" in caplog.text
    assert joined.shuffled(0)[:2] == load_examples([one, two], seed=0, limit=2)
    assert joined.dataset["prompt"][:] == [e.prompt for e in expected] and joined.where(3).endswith("b.csv (line 2)")
    with pytest.raises(InvalidArgument, match="source is empty"):
        load_examples([])


def test_a_shard_without_rows_is_named(tmp_path, caplog):
    write(tmp_path / "a.jsonl", EXAMPLES)
    (tmp_path / "b.jsonl").write_text("\n")
    assert load_examples(f"{tmp_path}/*.jsonl") == EXAMPLES
    assert "files without rows" in caplog.text and "b.jsonl" in caplog.text


@pytest.mark.parametrize("kind", [list, "table"])
def test_copies_are_held_out_together(tmp_path, kind):
    copied = [*EXAMPLES, *EXAMPLES[:5], EXAMPLES[0]]
    examples = copied if kind is list else load_examples(write(tmp_path / "a.jsonl", copied))
    for seed in range(10):
        train, held_out = split_examples(examples, 9, seed)
        assert len(held_out) == 9 and len(train) == len(copied) - 9
        assert not set(train) & set(held_out)
        assert type(train) is type(examples)
    plain, same = split_examples(EXAMPLES, 4, 3)  # without copies: the order in which a list is shuffled
    shuffled = list(EXAMPLES)
    random.Random(3).shuffle(shuffled)
    assert (plain, same) == (shuffled[4:], shuffled[:4])
    with pytest.raises(InvalidArgument, match="more copies"):
        split_examples(EXAMPLES[:1] * 9, 4, 0)


def test_copies_of_test_rows_are_not_trained_on(caplog):
    test = [EXAMPLES[2], Example("q3", "another answer"), Example("text", "")]
    with caplog.at_level(logging.INFO):
        left = without_copies([*EXAMPLES, EXAMPLES[2], Example("text", "")], test)
    assert left == [*EXAMPLES[:2], *EXAMPLES[3:]]
    assert "removed 3 training examples" in caplog.text and "1 training examples have the prompt" in caplog.text
    with pytest.raises(InvalidArgument, match="all 20 training examples"):
        without_copies(EXAMPLES, EXAMPLES)
    assert without_copies(EXAMPLES, test[1:]) is EXAMPLES


def test_the_split_of_test_data(tmp_path):
    (tmp_path / "x").mkdir()
    path = write(tmp_path / "x" / "train.jsonl", EXAMPLES)
    assert part_for_tests(path) == part_for_tests(tmp_path / "x") == part_for_tests(f"{tmp_path}/x/*") == "train"
    write(tmp_path / "x" / "test.jsonl", EXAMPLES[:1])
    assert part_for_tests(tmp_path / "x") == "test" == part_for_tests("owner/name")
    assert load_examples(tmp_path / "x", split="test") == EXAMPLES[:1]


def test_a_snapshot_of_a_hub_data_set_consists_of_links(tmp_path):
    """And its folder may have the name of one of the builders of `datasets`."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "json" / "data").mkdir(parents=True)
    write(tmp_path / "blobs" / "a1b2", EXAMPLES)
    (tmp_path / "json" / "data" / "train-00000.jsonl").symlink_to("../../blobs/a1b2")
    assert load_examples(tmp_path / "json") == EXAMPLES


def command_line(*arguments):
    return build_parser().parse_args(["run", "--model", "m", "--steps", "1", "--out", "o", *map(str, arguments)])


def test_training_and_test_examples_of_a_command(tmp_path, caplog):
    train = write(tmp_path / "train.jsonl", [*EXAMPLES, EXAMPLES[3]])
    test, more = write(tmp_path / "test.jsonl", EXAMPLES[2:5]), write(tmp_path / "more.jsonl", EXAMPLES[:1])
    with caplog.at_level(logging.INFO):
        trained, tested = data_options.split(command_line("--data", train, "--test-data", test, more))
    assert sorted(map(repr, trained)) == sorted(map(repr, [EXAMPLES[1], *EXAMPLES[5:]]))
    assert set(tested) == {EXAMPLES[0], *EXAMPLES[2:5]} and tested.sets == ((str(test), 3), (str(more), 1))
    assert "removed 5 training examples" in caplog.text
    trained, tested = data_options.split(command_line("--data", train, "--held-out", 0.2, "--test-limit", 2))
    assert len(trained) == 17 and len(tested) == 2 and not set(trained) & set(tested)
    options = ["--data", train, more, "--as-chat", "--system", "Add.", "--held-out", "0.5"]
    trained, _ = data_options.split(command_line(*options))
    assert [message.role for message in trained[0].prompt] == ["system", "user"]


def test_a_test_split_that_is_not_used_is_named(tmp_path, caplog):
    for name, word in (("train", "a"), ("test", "b")):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{word} {n}"}) + "\n" for n in range(4)))
    options = command_line("--data", str(tmp_path), "--held-out", "0.5")
    trained, tested = data_options.split(options)
    assert {example.prompt[0] for example in (*trained, *tested)} == {"a"}
    assert f"the split 'test' of {tmp_path} is not used" in caplog.text
    caplog.clear()
    _, tested = data_options.split(command_line("--data", str(tmp_path), "--test-data", str(tmp_path)))
    assert {example.prompt[0] for example in tested} == {"b"} and "not used" not in caplog.text


def test_options_of_the_hub_reach_it(monkeypatch):
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        table = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
        return table.to_iterable_dataset() if options.get("streaming") else table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_examples("owner/name", config="easy", revision="abc", split="train[:3]")) == 3
    assert load_examples("owner/name", streaming=True, limit=2) == [Example("a"), Example("b")]
    assert asked == [
        ("owner/name", {"name": "easy", "revision": "abc", "split": "train[:3]"}),
        ("owner/name", {"split": "train", "streaming": True}),
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"streaming": True}, ["streaming", "limit"]),
        ({"revision": "x"}, ["revision", "hub"]),
        ({"config": "x"}, ["config", "hub"]),
        ({"format": "chatml"}, ["format", "sharegpt"]),
        ({"format": "text"}, ["format", "'text'", "'question'"]),
        ({"format": "text", "prompt": "{question}"}, ["prompt", "format"]),
        ({"text_rows": "word"}, ["text_rows", "paragraph"]),
        ({"skip_bad_rows": 1}, ["skip_bad_rows", "below 1"]),
        ({"delimiter": "::"}, ["delimiter", "one character"]),
        ({"encoding": "utf-9"}, ["encoding", "utf-9"]),
        ({"system": " "}, ["system", "empty"]),
        ({"prompt": "{question}", "as_chat": True}, ["chat", "answer template"]),
        ({"split": "train[:0]"}, ["split", "[:0]"]),
        ({"split": "train[x]"}, ["split", "[x]"]),
        ({"split": "["}, ["split", "accepted"]),
    ],
)
def test_wrong_options_are_named(tmp_path, options, words):
    with pytest.raises(InvalidArgument) as caught:
        load_examples(write(tmp_path / "a.jsonl", EXAMPLES), **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_chats_from_one_source_and_text_from_another_are_named(tmp_path, caplog):
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": r, "content": "x"} for r in ("user", "assistant")]}) + "\n")
    pairs = write(tmp_path / "pairs.jsonl", EXAMPLES)
    load_examples([chats, pairs], as_chat=True)
    load_examples([pairs, pairs])
    assert "plain text" not in caplog.text
    load_examples([chats, pairs])
    assert f"chats from {chats}, plain text from {pairs}, which gets no chat template" in caplog.text


def test_the_same_data_set_is_tested_at_the_commit_that_is_trained_on(tmp_path, monkeypatch):
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options.get("name"), options.get("revision"), options["split"]))
        return datasets.Dataset.from_dict({"text": [f"{path} {options['split']} {n}" for n in range(3)]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = ("--data-config", "easy", "--revision", "abc", "--test-data", "owner/name", "owner/other")
    data_options.split(command_line("--data", "owner/name", *hub))
    assert asked == [
        ("owner/name", "easy", "abc", "train"),
        ("owner/name", "easy", "abc", "test"),
        ("owner/other", None, None, "test"),
    ]


def test_messages_are_equal_whatever_the_order_of_their_keys(tmp_path):
    def example(*keys):
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
        turns[1] |= {key: "x" for key in keys}
        (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
        return load_examples(tmp_path / "a.jsonl")[0]

    assert example("name", "thinking") == example("thinking", "name") != example("name")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": False}]},
            ["message 2", "not to be learned"],
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train_detail": []}]},
            ["message 2", "not to be learned"],
        ),
        ({"instruction": "a", "output": "b", "history": [["Hi", None]]}, ["history", "pairs of text"]),
    ],
)
def test_what_would_be_learned_by_mistake_is_refused(tmp_path, row, words):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InvalidArgument) as caught:
        load_examples(tmp_path / "a.jsonl")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_row_with_more_choices_than_the_first_keeps_them(tmp_path):
    two = {"question": "Q", "A": "x", "B": "y", "answer": "A"}
    rows = [two, {**two, "C": "z"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short, long = load_examples(tmp_path / "a.jsonl")
    assert short.prompt == "Q\nA. x\nB. y\nAnswer:" and long.prompt == "Q\nA. x\nB. y\nC. z\nAnswer:"


@pytest.mark.skipif(
    Version(datasets.__version__) < Version("5"),
    reason="older datasets refuse such values, or write null into the keys that a row has not",
)
@pytest.mark.parametrize(
    "rows",
    [
        [{"text": "x", "label": "a"}, {"text": "y", "label": 1}],
        [
            {
                "messages": [
                    {"role": "user", "content": "u", "name": "Ann"},
                    {"role": "assistant", "content": "v", "tool_calls": [{"function": {"arguments": {key: 1}}}]},
                ],
                "tools": [{"name": key, "parameters": {key: None}}],
            }
            for key in "ab"
        ],
    ],
)
def test_values_of_several_types_are_as_in_the_file(tmp_path, rows):
    """`datasets` 5 keeps them as JSON texts, with quotes around text."""
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    table.to_parquet(str(tmp_path / "a.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    expected = list(load_examples(file))
    assert expected == load_examples(tmp_path / "saved") and expected == load_examples(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"text": "x"}, {"label": "a"}),
        ({"instruction": "i", "output": "o"}, {"messages": [{"role": "user", "content": "x"}]}),
        ({"messages": [{"role": r, "content": "x"} for r in ("user", "assistant")]}, {"prompt": "p", "answer": "a"}),
    ],
)
def test_a_later_row_of_another_format_is_refused(tmp_path, first, second):
    file = tmp_path / "a.jsonl"
    rows = [first, {**first, "id": 1}, {**first, **second}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InvalidArgument, match=r"row 3 .*line 3.* further columns .*the first row is .*\(format\)"):
        load_examples(file)
    meant = {"text": "text", "instruction": "alpaca", "messages": "messages"}[next(iter(first))]
    assert len(load_examples(file, format=meant)) == 3
