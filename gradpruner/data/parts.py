"""Parts and orders of examples. Those on disk stay there."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from gradpruner.data.examples import Example


def with_answer(examples: Sequence[Example]) -> Sequence[Example]:
    """Return the examples that have an answer."""
    found = [index for index, example in enumerate(examples) if example.answer]
    return examples if len(found) == len(examples) else _selected(examples, found)


def shuffled(examples: Sequence[Example], seed: int) -> Sequence[Example]:
    """Return the examples in another order.

    Args:
        examples: all examples.
        seed: of the order, which is that of a list shuffled by `random.Random(seed)`.
    """
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    return _selected(examples, order)


def _selected(examples: Sequence[Example], places: Sequence[int]) -> Sequence[Example]:
    on_disk: Any = getattr(examples, "select", None)
    return [examples[place] for place in places] if on_disk is None else on_disk(places)
