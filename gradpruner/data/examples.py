"""One example of a task, and how examples are held out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from gradpruner.errors import InvalidArgument


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Args:
        role: who speaks: "system", "user", "assistant" or "tool".
        content: the text.
        more: JSON of the message's other keys, for example `tool_calls`. Default: none.
    """

    role: str
    content: str
    more: str = ""


@dataclass(frozen=True)
class Example:
    """One prompt and the answer to learn.

    Args:
        prompt: text or messages before the answer.
        answer: text or messages to learn. If it is empty, the prompt is plain language-model text.
        tools: JSON of the tools that a chat template may show. Default: none.
    """

    prompt: str | tuple[Message, ...] = ""
    answer: str | tuple[Message, ...] = ""
    tools: str = ""


def split_examples(
    examples: Sequence[Example], held_out: int | float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Shuffle examples and hold some of them out.

    Args:
        examples: all examples.
        held_out: how many to hold out if it is an int, or their share if it is a float.
        seed: of the shuffling.

    Returns:
        The examples to train on, and those that are held out.

    Raises:
        InvalidArgument: one of the two parts would be empty.
    """
    count = round(held_out * len(examples)) if isinstance(held_out, float) else held_out
    if not 0 < count < len(examples):
        raise InvalidArgument(
            f"held_out is {held_out}, which is {count} of {len(examples)} examples; "
            "accepted: a count (int) or a share (float) that leaves both parts at least one"
        )
    shuffled = list(examples)
    random.Random(seed).shuffle(shuffled)
    return shuffled[count:], shuffled[:count]
