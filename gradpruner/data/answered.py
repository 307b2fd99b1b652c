"""Which examples have an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradpruner.data.examples import Example


def with_answer(examples: Sequence[Example]) -> Sequence[Example]:
    """Return the examples that have an answer. Those on disk stay there."""
    found = [index for index, example in enumerate(examples) if example.answer]
    if len(found) == len(examples):
        return examples
    on_disk: Any = getattr(examples, "select", None)
    return [examples[index] for index in found] if on_disk is None else on_disk(found)
