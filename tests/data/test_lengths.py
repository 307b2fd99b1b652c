"""Examples that are too long, special tokens, and the counts of both."""

from __future__ import annotations

import chat_templates as templates
import pytest
from chat_templates import chat_tokenizer
from tokenizers import processors
from word_tokenizers import make_tokenizer

from gradpruner.data.counts import Counts
from gradpruner.data.examples import Example, Message
from gradpruner.data.tokens import tokenize
from gradpruner.errors import InvalidArgument

BOOK = Example("abcdefghijklmnopqrstuvwxyz")
LONG = Example("0123456789", "yes")


def text(tokenizer, row):
    return tokenizer.decode(row["input_ids"])


@pytest.mark.parametrize("bos", [False, True])
def test_a_book_becomes_consecutive_rows(bos):
    tokenizer = make_tokenizer(bos=bos)
    rows = tokenize([BOOK, Example("ab")], tokenizer, max_length=10)
    assert all(row["labels"] == row["input_ids"] for row in rows)
    texts = [text(tokenizer, row) for row in rows]
    if bos:  # each window begins as the tokenizer begins a text
        assert texts == ["<s>abcdefghi", "<s>jklmnopqr", "<s>stuvwxyz</s>", "<s>ab</s>"]
    else:
        assert texts == ["abcdefghij", "klmnopqrst", "uvwxyz</s>", "ab</s>"]
    assert rows.counts == Counts(examples=2, rows=4, tokens=34 if bos else 30, learned=30 if bos else 26, split=1)


def test_no_row_is_one_token():
    tokenizer = make_tokenizer()
    texts = [text(tokenizer, row) for row in tokenize([BOOK], tokenizer, max_length=13)]
    assert texts == ["abcdefghijklm", "nopqrstuvwxy", "z</s>"]


def test_what_becomes_of_long_examples():
    tokenizer = make_tokenizer(bos=True)
    examples = [Example("a", "b"), LONG, BOOK]
    rows = tokenize(examples, tokenizer, max_length=9, too_long="cut")
    assert [text(tokenizer, row) for row in rows] == ["<s>a b</s>", "<s>789 yes</s>", "<s>tuvwxyz</s>"]
    counts = rows.counts
    assert (counts.rows, counts.cut, counts.cut_tokens, counts.skipped) == (3, 2, 7 + 19, 0)
    assert "2 too long and cut by 26 tokens in all" in counts.line()
    rows = tokenize(examples, tokenizer, max_length=9, too_long="skip")
    assert [text(tokenizer, row) for row in rows] == ["<s>a b</s>"]
    assert (rows.counts.skipped, rows.counts.skipped_tokens) == (2, 16 + 28)
    assert "2 too long and skipped, with 44 tokens" in rows.counts.line()
    assert "none is too long" in tokenize(examples[:1], tokenizer, max_length=9).counts.line()


@pytest.mark.parametrize(
    ("example", "options", "match"),
    [
        (LONG, {"too_long": "error"}, r"example 1 \('0123456789'\) has 15 tokens.*too_long 'cut' or 'skip'"),
        (BOOK, {"too_long": "error"}, "has 27 tokens"),
        (LONG, {"too_long": "split"}, "only text without an answer can be split"),
        (LONG, {"max_length": 4}, "answer of example 1.*needs 6 tokens.*too_long 'skip'"),
        (BOOK, {"max_length": 1}, "expected 2 or more"),
        (BOOK, {"too_long": "trim"}, "too_long.*trim.*cut.*skip.*error.*split"),
    ],
)
def test_refusals(example, options, match):
    with pytest.raises(InvalidArgument, match=match):
        tokenize([example], make_tokenizer(), **{"max_length": 9, **options})


def test_an_answer_that_does_not_fit_is_skipped_if_asked_for():
    rows = tokenize([LONG, Example("a", "b")], make_tokenizer(), max_length=4, too_long="skip")
    assert len(rows) == 1 and rows.counts.skipped == 1


def chat(*contents, system=False):
    messages = [Message("user" if i % 2 == 0 else "assistant", content) for i, content in enumerate(contents)]
    first = (Message("system", "S"),) if system else ()
    return Example((*first, messages[0]), tuple(messages[1:]))


@pytest.mark.parametrize("system", [False, True])
def test_a_conversation_loses_its_oldest_exchanges(system):
    tokenizer = chat_tokenizer(templates.LLAMA)
    long = chat("aaaa", "bbbb", "cccc", "dddd", "ee", "ff", system=system)
    short = chat("cccc", "dddd", "ee", "ff", system=system)
    (expected,) = tokenize([short], tokenizer, max_length=1000)
    length = len(expected["input_ids"])
    rows = tokenize([long], tokenizer, max_length=length + 3)
    assert rows[0] == expected
    (whole,) = tokenize([long], tokenizer, max_length=1000)
    assert rows.counts.cut == 1 and rows.counts.cut_tokens == len(whole["input_ids"]) - length
    (last,) = tokenize([long], tokenizer, max_length=length - 1)
    assert [last] == tokenize([chat("ee", "ff", system=system)], tokenizer, max_length=1000)
    with pytest.raises(InvalidArgument, match=r"example 1 needs .* for its last exchange alone"):
        tokenize([long], tokenizer, max_length=10)
    assert tokenize([long], tokenizer, max_length=10, too_long="skip").counts.skipped == 1
    with pytest.raises(InvalidArgument, match=r"\(\d messages\) has"):
        tokenize([long], tokenizer, max_length=10, too_long="error")


def framed(single, *special):
    """A tokenizer that puts special tokens around every text."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[gMASK]", "<sop>", "[SEP]"]})
    pairs = [(token, tokenizer.convert_tokens_to_ids(token)) for token in special]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=pairs)
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (framed("[gMASK] <sop> $A", "[gMASK]", "<sop>"), "[gMASK]<sop>Q a</s>"),  # several tokens, none of them BOS
        (framed("$A </s>", "</s>"), "Q a</s>"),
        (framed("<s> $A </s>", "<s>", "</s>"), "<s>Q a</s>"),
        (framed("<s> $A [SEP]", "<s>", "[SEP]"), "<s>Q a</s>"),
    ],
)
def test_special_tokens_once(tokenizer, expected):
    (row,) = tokenize([Example("Q", "a")], tokenizer, max_length=99)
    assert text(tokenizer, row) == expected
    prefix = expected.partition("Q")[0]
    if prefix:
        (again,) = tokenize([Example(f"{prefix}Q", "a")], tokenizer, max_length=99)
        assert again == row  # the text begins with it already
    (plain,) = tokenize([Example("Qa</s>")], tokenizer, max_length=99)
    assert text(tokenizer, plain) == f"{prefix}Qa</s>"
    if prefix == "[gMASK]<sop>":
        (cut,) = tokenize([Example("QQQQ", "a")], tokenizer, max_length=5)
        assert text(tokenizer, cut) == "[gMASK]<sop> a</s>"
