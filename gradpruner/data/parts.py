"""Parts of examples. Those on disk stay there."""

from __future__ import annotations

from collections.abc import Sequence

from gradpruner.data.examples import Example, taken


def with_answer(examples: Sequence[Example]) -> Sequence[Example]:
    """Return the examples that have an answer."""
    found = [index for index, example in enumerate(examples) if example.answer]
    return examples if len(found) == len(examples) else taken(examples, found)
