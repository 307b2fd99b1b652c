from __future__ import annotations

import json

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers
from transformers import (
    PreTrainedTokenizerFast,
)
from word_tokenizers import make_tokenizer

from gradpruner.data.collator import Collator
from gradpruner.data.examples import Example, split_examples
from gradpruner.data.load import load_examples
from gradpruner.data.tokens import tokenize
from gradpruner.errors import InvalidArgument


def make_sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space is put before every text, also before one that starts with a space."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<unk>", "▁q", "▁yes", "▁a"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def texts(tokenizer, row) -> tuple[str, str]:
    """What a row says in full, and what of it is learned."""
    learned = [label for label in row["labels"] if label != -100]
    return tokenizer.decode(row["input_ids"]), tokenizer.decode(learned)


@pytest.fixture
def csv_file(tmp_path):
    path = tmp_path / "intents.csv"
    path.write_text('text,category\n"Hello, you",greeting\nBye,farewell\n', encoding="utf-8")
    return path


ROWS = [{"text": "Hello, you", "category": "greeting"}, {"text": "Bye", "category": "farewell"}]
EXPECTED = [Example("Hello, you", "greeting"), Example("Bye", "farewell")]


def test_all_file_types_give_the_same_examples(tmp_path, csv_file):
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, ROWS)), encoding="utf-8-sig")
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    for path in (csv_file, tmp_path / "a.jsonl", str(tmp_path / "a.json")):
        assert load_examples(path) == EXPECTED


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "completion": "c"}, Example("p", "c")),
        ({"prompt": "p", "response": "r", "text": "t"}, Example("p", "r")),
        ({"question": "q", "answer": 3}, Example("q", "3")),
        ({"instruction": "i", "output": "o"}, Example("i", "o")),
        ({"label": 1, "text": "t"}, Example("t", "1")),
        ({"text": "plain", "url": None}, Example("plain", "")),
    ],
)
def test_known_columns(tmp_path, row, expected):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    assert load_examples(path) == [expected]


def test_templates(csv_file):
    examples = load_examples(csv_file, prompt=r"Q: {text} {{}}\nIntent:", answer="<{category}>")
    assert examples[1] == Example("Q: Bye {}\nIntent:", "<farewell>")
    assert load_examples(csv_file, prompt="{text}")[0] == Example("Hello, you", "")


def test_shuffle_then_limit(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"question": str(i), "answer": "x"}) for i in range(50)))
    ordered = load_examples(path)
    shuffled = load_examples(path, seed=3)
    assert [e.prompt for e in ordered] == [str(i) for i in range(50)]
    assert shuffled != ordered and sorted(map(repr, shuffled)) == sorted(map(repr, ordered))
    assert load_examples(path, seed=3, limit=5) == shuffled[:5]
    assert load_examples(path, seed=4) != shuffled


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": "{missing}"}, ["prompt", "'missing'", "'text', 'category'"]),
        ({"prompt": "{text}", "answer": "{text.upper}"}, ["answer", "'text.upper'"]),
        ({"prompt": "{text!r}"}, ["prompt", "format"]),
        ({"prompt": "{text"}, ["prompt", "broken template"]),
        ({"answer": "{category}"}, ["answer", "without prompt"]),
        ({"limit": 0}, ["limit", "0"]),
        ({"split": "test"}, ["split", "'test'"]),
    ],
)
def test_wrong_options_are_named(csv_file, options, words):
    with pytest.raises(InvalidArgument) as caught:
        load_examples(csv_file, **options)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', ["a.jsonl", "line 3", "broken JSON"]),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', ["line 2", "list"]),
        ("a.jsonl", "\n", ["no rows"]),
        ("a.json", '[{"text": "a"},\n{]', ["line 2", "broken JSON"]),
        ("a.json", '{"text": "a"}', ["not a JSON list"]),
        ("a.csv", "", ["no rows"]),
        ("a.csv", "text,label\na,b\nc\n", ["line 3", "2 cells"]),
        ("a.csv", "text,label\na,b,c\n", ["line 2", "2 cells"]),
        ("a.csv", 'text,label\na,"b\n', ["broken CSV"]),
        ("a.csv", "text,label\na,\n", ["row 1", "empty answer"]),
        ("a.xml", "hello", ["a.xml", ".jsonl, .json, .csv, .txt"]),
        ("a.txt", " \n", ["a.txt", "no rows"]),
        ("a.jsonl", '{"text": "a"}\n{"text": null}', ["row 2", "'text'", "no value"]),
        ("a.jsonl", '{"text": "a"}\n{"text": NaN}', ["row 2", "no value"]),
        ("a.jsonl", '{"text": "a"}\n{"other": "b"}', ["row 2", "'text'", "no value"]),
        ("a.jsonl", '{"text": ["a"]}', ["row 1", "list"]),
        ("a.jsonl", '{"text": " "}', ["row 1", "empty text"]),
        ("a.jsonl", '{"column": "b"}', ["prompt", "'column'"]),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(InvalidArgument) as caught:
        load_examples(tmp_path / name)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_sources(tmp_path):
    (tmp_path / "latin.csv").write_bytes("text\ncaf\u00e9\n".encode("latin-1"))
    with pytest.raises(InvalidArgument, match="UTF-8"):
        load_examples(tmp_path / "latin.csv")
    with pytest.raises(InvalidArgument, match="does not exist"):
        load_examples(tmp_path / "missing.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidArgument, match="is a folder without data"):
        load_examples(tmp_path / "empty")
    with pytest.raises(InvalidArgument, match="hub id"):
        load_examples("some/where/else")


REVIEWS = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])})


def stub_hub(monkeypatch, load_dataset):
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_hub_data_set_with_class_names(monkeypatch):
    def load_dataset(name, split):
        assert (name, split) == ("owner/reviews", "test")
        return datasets.Dataset.from_dict({"text": ["Fine", "Poor"], "label": [1, 0]}, features=REVIEWS)

    stub_hub(monkeypatch, load_dataset)
    assert load_examples("owner/reviews", split="test") == [Example("Fine", "good"), Example("Poor", "bad")]


def test_unlabelled_hub_row_is_refused(monkeypatch):
    table = datasets.Dataset.from_dict({"text": ["?"], "label": [-1]}, features=REVIEWS)
    stub_hub(monkeypatch, lambda name, split: table)
    with pytest.raises(InvalidArgument, match="no value"):
        load_examples("reviews", prompt="{label}")


def test_unknown_hub_data_set_is_one_line(monkeypatch):
    def load_dataset(name, split):
        raise FileNotFoundError("Dataset 'nobody/nothing' doesn't exist\non the Hub")

    stub_hub(monkeypatch, load_dataset)
    with pytest.raises(InvalidArgument, match=r"^data set 'nobody/nothing', split 'train': .* exist$"):
        load_examples("nobody/nothing")


def test_split_examples():
    examples = [Example(str(i), "x") for i in range(10)]
    train, held_out = split_examples(examples, 3, seed=1)
    assert len(held_out) == 3 and sorted(e.prompt for e in train + held_out) == sorted(map(str, range(10)))
    assert (train, held_out) == split_examples(examples, 0.3, seed=1)
    assert held_out != split_examples(examples, 3, seed=2)[1]
    for wrong in (0, 10, 0.01, 1.0, -1):
        with pytest.raises(InvalidArgument, match="held_out"):
            split_examples(examples, wrong, seed=1)


@pytest.mark.parametrize("bos", [False, True])
def test_tokenize_labels_only_the_answer(bos):
    tokenizer = make_tokenizer(bos=bos)
    (row,) = tokenize([Example("Q:", "yes")], tokenizer, max_length=32)
    assert texts(tokenizer, row) == (("<s>" if bos else "") + "Q: yes</s>", " yes</s>")
    (row,) = tokenize([Example("Q:", "yes")], tokenizer, max_length=32, train_on="all")
    assert row["labels"] == row["input_ids"]


@pytest.mark.parametrize(("prompt", "answer"), [("Q:\n", "yes"), ("Q:", " yes"), ("", "yes"), ("Q: ", "yes")])
def test_no_space_is_added_where_there_is_one(prompt, answer):
    tokenizer = make_tokenizer()
    (row,) = tokenize([Example(prompt, answer)], tokenizer, max_length=32)
    assert texts(tokenizer, row)[0] == prompt + answer + "</s>"


def test_tokenizer_that_adds_its_own_space():
    tokenizer = make_sentencepiece_like()
    (row,) = tokenize([Example("q", "yes")], tokenizer, max_length=32)
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["▁q", "▁yes", "</s>"]


def test_plain_text_is_learned_in_full():
    tokenizer = make_tokenizer()
    (row,) = tokenize([Example("Once", "")], tokenizer, max_length=32)
    assert texts(tokenizer, row) == ("Once</s>", "Once</s>")


def test_long_prompt_loses_its_beginning_and_keeps_bos():
    tokenizer = make_tokenizer(bos=True)
    (row,) = tokenize([Example("0123456789", "yes")], tokenizer, max_length=9)
    assert texts(tokenizer, row) == ("<s>789 yes</s>", " yes</s>")
    (row,) = tokenize([Example("0123456789", "yes")], tokenizer, max_length=6)
    assert texts(tokenizer, row) == ("<s> yes</s>", " yes</s>")


@pytest.mark.parametrize("bos", [False, True])
def test_answer_that_does_not_fit_is_refused(bos):
    examples = [Example("a", "b"), Example("0123456789", "yes")]
    with pytest.raises(InvalidArgument, match=r"max_length is 5.*example 2 \('yes'\) needs 6"):
        tokenize(examples, make_tokenizer(bos=bos), max_length=5)
    assert len(tokenize(examples, make_tokenizer(bos=bos), max_length=6)) == 2


def test_tokenize_refusals():
    tokenizer = make_tokenizer()
    with pytest.raises(InvalidArgument, match="train_on"):
        tokenize([Example("a", "b")], tokenizer, max_length=9, train_on="prompt")
    tokenizer.eos_token = None
    with pytest.raises(InvalidArgument, match="end token"):
        tokenize([Example("a", "b")], tokenizer, max_length=9)
    assert tokenize([], make_tokenizer(), max_length=9) == []


def test_collator_pads_right_to_a_multiple_of_eight():
    tokenizer = make_tokenizer()
    collate = Collator(tokenizer)
    batch = collate(
        [
            {"input_ids": list(range(10, 19)), "labels": [-100, *range(11, 19)]},
            {"input_ids": [7, 1], "labels": [-100, 1]},
        ]
    )
    assert all(tensor.shape == (2, 16) and tensor.dtype == torch.int64 for tensor in batch.values())
    assert batch["input_ids"][1].tolist() == [7, 1] + [tokenizer.pad_token_id] * 14
    assert batch["labels"][1].tolist() == [-100, 1] + [-100] * 14
    assert batch["attention_mask"].sum(1).tolist() == [9, 2]
    assert batch["input_ids"][0, :9].tolist() == list(range(10, 19))


def test_collator_falls_back_to_the_end_token():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.padding_side = "left"
    collate = Collator(tokenizer)
    assert collate.pad_id == tokenizer.eos_token_id
    batch = collate([{"input_ids": [7, 8], "labels": [-100, 8]}])
    assert batch["input_ids"].tolist() == [[7, 8] + [tokenizer.eos_token_id] * 6]
    assert batch["attention_mask"].tolist() == [[1] * 2 + [0] * 6]
    assert tokenizer.pad_token is None and tokenizer.padding_side == "left"  # the user's own is not changed
    tokenizer.eos_token = None
    with pytest.raises(InvalidArgument, match="padding"):
        Collator(tokenizer)


@pytest.mark.parametrize("names", [["input_ids"], ["input_ids", "token_type_ids"]])
def test_a_batch_has_its_mask_whatever_the_tokenizer_gives_its_own_model(names):
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = list(names)
    rows = [{"input_ids": [7, 8], "labels": [-100, 8], "source": "a.csv"}, {"input_ids": [9], "labels": [9]}]
    batch = Collator(tokenizer)(rows)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}  # the model takes no other column of a row
    assert batch["attention_mask"].tolist() == [[1] * 2 + [0] * 6, [1] + [0] * 7]
    assert tokenizer.model_input_names == names


# ---- loading a model


def test_a_text_file_is_one_text(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffOne line.\n\nAnother.", encoding="utf-8")
    assert load_examples(tmp_path / "a.txt") == [Example("One line.\n\nAnother.", "")]
