"""One example of a task, a digest of many, and how examples are held out."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from gradpruner.errors import InvalidArgument

TEXT, CHAT = "text", "chat"  # kinds of an example

Record = tuple[str, str, str, str]  # kind, prompt, answer, tools: an example as four strings


@dataclass(frozen=True)
class Message:
    """One message of a chat.

    Args:
        role: who speaks, such as "user" or "assistant".
        content: the text.
        more: JSON object of the message's other keys, such as `tool_calls`. Empty if there are none.
    """

    role: str
    content: str
    more: str = ""


@dataclass(frozen=True)
class Example:
    """One prompt and the answer to learn. Both are text, or both are messages of a chat.

    Args:
        prompt: text or messages before the answer.
        answer: text or messages to learn. If it is empty, the prompt is plain language-model text. The answer of a
            chat begins with the first turn of the assistant, and holds all that follows.
        tools: JSON list of the tools that a chat template may show. Empty if there are none.
    """

    prompt: str | tuple[Message, ...] = ""
    answer: str | tuple[Message, ...] = ""
    tools: str = ""


def encoded(example: Example) -> Record:
    """Return an example as four strings, in which messages are JSON.

    Raises:
        InvalidArgument: one of prompt and answer is text, and the other one is messages.
    """
    prompt, answer = example.prompt, example.answer
    if isinstance(prompt, str) and isinstance(answer, str):
        return TEXT, prompt, answer, example.tools
    if isinstance(prompt, str) or isinstance(answer, str):
        raise InvalidArgument("prompt and answer of an example differ in kind; expected two texts, or messages in both")
    return CHAT, _messages_to_json(prompt), _messages_to_json(answer), example.tools


def decoded(record: Record) -> Example:
    """Return the example that `encoded` has turned into four strings."""
    kind, prompt, answer, tools = record
    if kind == TEXT:
        return Example(prompt, answer, tools)
    return Example(_messages_from_json(prompt), _messages_from_json(answer), tools)


def _messages_to_json(messages: tuple[Message, ...]) -> str:
    plain = [
        {"role": m.role, "content": m.content, "more": m.more} if m.more else {"role": m.role, "content": m.content}
        for m in messages
    ]
    return json.dumps(plain, ensure_ascii=False)


def _messages_from_json(text: str) -> tuple[Message, ...]:
    return tuple(Message(**message) for message in json.loads(text))


def records(examples: Iterable[Example]) -> Iterator[Record]:
    """Return each example as four strings. A table of examples gives them as they are stored."""
    stored = getattr(examples, "records", None)
    return stored() if stored is not None else map(encoded, examples)


def digest_of_examples(*parts: Iterable[Example]) -> str:
    """Return a digest of the content of examples, in their order.

    It does not depend on whether the examples are in a list or in a table, nor on how they are divided into parts.
    """
    digest = hashlib.sha256()
    for examples in parts:
        for record in records(examples):
            digest.update(json.dumps(record).encode() + b"\n")
    return digest.hexdigest()


def split_examples(
    examples: Sequence[Example], held_out: int | float, seed: int
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Shuffle examples and hold some of them out. All copies of an example go to the same part.

    Args:
        examples: all examples.
        held_out: how many to hold out if it is an int, or their share if it is a float. It can be fewer if copies do
            not fit.
        seed: of the shuffling.

    Returns:
        The examples to train on, and those that are held out. Parts of a table are tables, else they are lists.

    Raises:
        InvalidArgument: one of the two parts would be empty.
    """
    count = round(held_out * len(examples)) if isinstance(held_out, float) else held_out
    if not 0 < count < len(examples):
        raise InvalidArgument(
            f"held_out is {held_out}, which is {count} of {len(examples)} examples; "
            "accepted: a count (int) or a share (float) that leaves both parts at least one"
        )
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    chosen = _whole_groups(order, fingerprints(examples), count)
    held = [place for place in order if place in chosen]
    if not held:
        raise InvalidArgument(
            f"held_out is {held_out}, which is {count} of {len(examples)} examples, but each example has more copies; "
            "remove the copies, hold more out, or give test data"
        )
    return taken(examples, [place for place in order if place not in chosen]), taken(examples, held)


def fingerprints(examples: Iterable[Example]) -> list[bytes]:
    """Return 16 bytes for each example, which are the same for equal examples."""
    return [hashlib.blake2b(json.dumps(r).encode(), digest_size=16).digest() for r in records(examples)]


def taken(examples: Sequence[Example], places: list[int]) -> Sequence[Example]:
    """Return the examples at some places.

    Args:
        examples: a table of examples, or any sequence.
        places: which examples, in the wanted order.

    Returns:
        A table for a table, else a list.
    """
    select = getattr(examples, "select", None)
    return select(places) if select is not None else [examples[place] for place in places]


def _whole_groups(order: list[int], prints: list[bytes], count: int) -> set[int]:
    """Return at most `count` places of an order such that all copies are in or out."""
    groups: dict[bytes, list[int]] = {}
    for place in order:
        groups.setdefault(prints[place], []).append(place)
    chosen: set[int] = set()
    for group in groups.values():  # in the order of their first copies
        if len(chosen) + len(group) <= count:
            chosen.update(group)
        if len(chosen) == count:
            break
    return chosen
