"""Text as one row of tokens, cut into windows of one length: to calibrate pruning on, and to take the perplexity of."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradpruner.checks import check_int
from gradpruner.errors import InvalidArgument
from gradpruner.training.data import Example


def text_of(examples: Sequence[Example]) -> str:
    """The examples one after the other, a blank line between them."""
    return "\n\n".join(f"{example.prompt} {example.answer}".strip() for example in examples)


def tokens_of(text: str, tokenizer: Any, length: int) -> list[int]:
    """All tokens of the text. Raises InvalidArgument if it has fewer than `length`, a window's, or that is below 2."""
    check_int("length", length, 2, "a number of tokens")
    tokens: list[int] = tokenizer(text, verbose=False)["input_ids"]
    if len(tokens) < length:
        raise InvalidArgument(f"data has {len(tokens)} tokens; expected {length} or more, one window")
    return tokens


def consecutive(tokens: Sequence[int], length: int) -> list[dict[str, list[int]]]:
    """Rows that cover the tokens one after the other; what is left of the last is left out. Every token is a label."""
    starts = range(0, len(tokens) - length + 1, length)
    return [{"input_ids": list(tokens[s : s + length]), "labels": list(tokens[s : s + length])} for s in starts]


def sampled(tokens: Sequence[int], length: int, count: int, seed: int) -> list[dict[str, Tensor]]:
    """`count` batches of one window each, input_ids int64 (1, length), at random places; they may overlap.

    Raises InvalidArgument.
    """
    check_int("samples", count, 1)
    places = random.Random(seed)
    starts = [places.randrange(len(tokens) - length + 1) for _ in range(count)]
    return [{"input_ids": torch.tensor([tokens[s : s + length]])} for s in starts]
