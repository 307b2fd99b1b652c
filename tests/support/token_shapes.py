"""Data from files to labels: what is learned of it, with the options that decide about that."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradpruner.data.load import load_examples
from gradpruner.data.tokens import tokenize
from gradpruner.model.loss import IGNORED

END = "<end>"  # in `TokenShape.learned`: the end token of the tokenizer

SYSTEM, HI, HELLO, BYE, CIAO = (
    {"role": role, "content": content}
    for role, content in (
        ("system", "Be kind."),
        ("user", "Hi there"),
        ("assistant", "Hello you"),
        ("user", "Bye now"),
        ("assistant", "Ciao friend"),
    )
)
TWO = [SYSTEM, HI, HELLO, BYE, CIAO]
LED = list(TWO)  # as prompt and completion: the assistant speaks in the prompt
SHAREGPT = [{"from": "human", "value": "Hi there"}, {"from": "gpt", "value": "Hello you"}]
SHORT = {"question": "One and two?", "answer": "Three"}
LONG = {"question": "What is " + "one and " * 40 + "two?", "answer": "Forty two"}
BOOK = "Once upon a time there was a king. " * 30
FIRST, SECOND = "Hello you<|im_end|>", "Ciao friend<|im_end|>"
CHAT = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
BETWEEN = "\n<|im_start|>user\nBye now<|im_end|>\n<|im_start|>assistant\n"
CHOICE = {"question": "Which is hot?", "choices": ["ice", "fire"], "answer": 1}


@dataclass(frozen=True)
class TokenShape:
    """One case.

    Args:
        name: for the table.
        rows: of a .jsonl file, or the text of a .txt file.
        learned: the text of the labels of each row, or of all rows together if it is a str, or words of the refusal.
        options: of `load_examples`.
        tokens: of `tokenize`.
        short_of: by how many tokens the longest row is too long. Default: nothing is too long.
    """

    name: str
    rows: list[dict[str, Any]] | str
    learned: list[str] | str | tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, Any] = field(default_factory=dict)
    short_of: int | None = None

    def tokenized(self, folder: Path, tokenizer: Any) -> tuple[Any, Any]:
        """Return the examples and their rows."""
        book = isinstance(self.rows, str)
        path = folder / ("a.txt" if book else "a.jsonl")
        path.write_text(self.rows if book else "".join(json.dumps(row) + "\n" for row in self.rows))
        examples, limit = load_examples(path, **self.options), 100_000
        if self.short_of is not None:
            every = tokenize(examples, tokenizer, max_length=limit)
            limit = max(len(row["input_ids"]) for row in every) - self.short_of
        return examples, tokenize(examples, tokenizer, max_length=limit, **self.tokens)


def learned_texts(rows: Any, tokenizer: Any) -> list[str]:
    """Return the text of the labels of each row."""
    return [tokenizer.decode([label for label in row["labels"] if label != IGNORED]) for row in rows]


def expected_texts(shape: TokenShape, tokenizer: Any) -> list[str] | str:
    """Return what is to be learned, with the end token of a tokenizer."""
    if isinstance(shape.learned, str):
        return shape.learned.replace(END, tokenizer.eos_token)
    return [text.replace(END, tokenizer.eos_token) for text in shape.learned]


def _chats(train_on: str, learned: Any, messages: Any = TWO) -> TokenShape:
    name = "chat" if messages is TWO else "prompt and completion of messages"
    row = {"messages": messages} if messages is TWO else {"prompt": messages[:4], "completion": messages[4:]}
    return TokenShape(f"{name}, train on {train_on}", [row], learned, tokens={"train_on": train_on})


def _long(what: str, rows: Any, too_long: str | None, learned: Any, short_of: int = 9) -> TokenShape:
    option = {} if too_long is None else {"too_long": too_long}
    return TokenShape(f"{what} too long, {too_long or 'default'}", rows, learned, tokens=option, short_of=short_of)


PAIRS = [SHORT, LONG]
TALKS = [{"messages": [HI, HELLO]}, {"messages": TWO}]
TOKEN_SHAPES = [
    TokenShape("question and answer", [SHORT], [f" Three{END}"]),
    TokenShape("question and answer, train on all", [SHORT], [f"One and two? Three{END}"], tokens={"train_on": "all"}),
    TokenShape("question and answer, train on assistant", [SHORT], ("assistant",), tokens={"train_on": "assistant"}),
    TokenShape("question and answer as chat", [SHORT], ["Three<|im_end|>"], {"as_chat": True}),
    TokenShape("Alpaca with input", [{"instruction": "Add.", "input": "1 2", "output": "3"}], [f" 3{END}"]),
    TokenShape("multiple choice", [CHOICE], [f" B{END}"]),
    TokenShape("ShareGPT", [{"conversations": SHAREGPT}], [FIRST]),
    _chats("answer", [FIRST + SECOND]),
    _chats("assistant", [FIRST + SECOND]),
    _chats("last", [SECOND]),
    _chats("all", [CHAT + FIRST + BETWEEN + SECOND + "\n"]),
    _chats("answer", [SECOND], LED),
    _chats("assistant", [FIRST + SECOND], LED),
    TokenShape("a text", [{"text": "Once upon"}], [f"Once upon{END}"]),
    _long("text", BOOK, None, f"{BOOK}{END}", 99),
    _long("text", BOOK, "split", f"{BOOK}{END}", 99),
    _long("text", [{"text": "Once upon"}, {"text": BOOK}], "skip", [f"Once upon{END}"]),
    _long("text", BOOK, "error", ("example 1", "too_long")),
    _long("pair", PAIRS, None, [f" Three{END}", f" Forty two{END}"]),
    _long("pair", PAIRS, "cut", [f" Three{END}", f" Forty two{END}"]),
    _long("pair", PAIRS, "skip", [f" Three{END}"]),
    _long("pair", PAIRS, "error", ("example 2", "line 2")),
    _long("pair", PAIRS, "split", ("example 2", "split")),
    _long("chat", TALKS, None, [FIRST, SECOND], 1),
    _long("chat", TALKS, "cut", [FIRST, SECOND], 1),
    _long("chat", TALKS, "skip", [FIRST], 1),
    _long("chat", TALKS, "error", ("example 2", "line 2"), 1),
    _long("chat", TALKS, "split", ("example 2", "split"), 1),
]
