"""Cut text into windows of one length, to calibrate pruning on or to take perplexity of."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradpruner.checks import check_int
from gradpruner.data.chat import ChatTemplate, is_chat, turns_of
from gradpruner.data.examples import Example
from gradpruner.data.special_tokens import around
from gradpruner.errors import InvalidArgument


def text_of(examples: Sequence[Example], tokenizer: Any) -> str:
    """Return the examples as one text, with a blank line after each text.

    Conversations follow each other as the chat template writes them.

    Args:
        examples: texts, pairs of texts, or conversations.
        tokenizer: the model's. Its chat template writes the conversations.

    Raises:
        InvalidArgument: an example has messages, and the tokenizer has no chat template or it refuses them.
    """
    template = ChatTemplate(tokenizer) if any(map(is_chat, examples)) else None
    parts: list[str] = []
    for example in examples:
        if template is not None and is_chat(example):
            parts.append(template.render(turns_of(example)[0], json.loads(example.tools) if example.tools else None))
        else:
            parts += [f"{example.prompt} {example.answer}".strip(), "\n\n"]
    return "".join(parts).removesuffix("\n\n")


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
    prefix = around(tokenizer)[0]
    if prefix and tokens[len(prefix) : 2 * len(prefix)] == prefix:  # a chat template has written it, too
        tokens = tokens[len(prefix) :]
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
