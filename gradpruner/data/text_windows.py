"""Cut text into windows of one length, to calibrate pruning on or to take perplexity of."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradpruner.checks import check_int
from gradpruner.data.chat import is_chat
from gradpruner.data.examples import Example
from gradpruner.errors import InvalidArgument


def text_of(examples: Sequence[Example]) -> str:
    """Return the examples as one text, with a blank line between them.

    Raises:
        InvalidArgument: an example has messages, which are no text.
    """
    if any(map(is_chat, examples)):
        raise InvalidArgument(
            "data: examples with messages cannot be joined to one text; expected text, or prompt and answer as text "
            "(--prompt and --answer name the columns)"
        )
    return "\n\n".join(f"{example.prompt} {example.answer}".strip() for example in examples)


def tokens_of(text: str, tokenizer: Any, length: int) -> list[int]:
    """Return all tokens of a text.

    Args:
        text: the text.
        tokenizer: the model's.
        length: tokens of a window.

    Raises:
        InvalidArgument: the text is shorter than one window, or `length` is below 2.
    """
    check_int("length", length, 2, "a number of tokens")
    tokens: list[int] = tokenizer(text, verbose=False)["input_ids"]
    if len(tokens) < length:
        raise InvalidArgument(f"data has {len(tokens)} tokens; expected {length} or more, one window")
    return tokens


def consecutive(tokens: Sequence[int], length: int) -> list[dict[str, list[int]]]:
    """Cut tokens into consecutive rows in which every token is a label.

    Tokens at the end that fill no row are left out.

    Args:
        tokens: of the whole text.
        length: tokens of a row.
    """
    starts = range(0, len(tokens) - length + 1, length)
    return [{"input_ids": list(tokens[s : s + length]), "labels": list(tokens[s : s + length])} for s in starts]


def sampled(tokens: Sequence[int], length: int, count: int, seed: int) -> list[dict[str, Tensor]]:
    """Take windows at random places of the tokens. They may overlap.

    Args:
        tokens: of the whole text.
        length: tokens of a window.
        count: how many windows.
        seed: of the places.

    Returns:
        Batches of one window each: `input_ids`, int64 of shape (1, length).

    Raises:
        InvalidArgument: `count` is below 1.
    """
    check_int("samples", count, 1)
    places = random.Random(seed)
    starts = [places.randrange(len(tokens) - length + 1) for _ in range(count)]
    return [{"input_ids": torch.tensor([tokens[s : s + length]])} for s in starts]
