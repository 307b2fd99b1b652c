"""Parts and orders of examples. Those on disk stay there."""

from __future__ import annotations

import random
from collections.abc import Sequence

from gradpruner.data.examples import Example, taken


def with_answer(examples: Sequence[Example]) -> Sequence[Example]:
    """Return the examples that have an answer."""
    found = [index for index, example in enumerate(examples) if example.answer]
    return examples if len(found) == len(examples) else taken(examples, found)


def shuffled(examples: Sequence[Example], seed: int) -> Sequence[Example]:
    """Return the examples in another order.

    Args:
        examples: all examples.
        seed: of the order, which is that of a list shuffled by `random.Random(seed)`.
    """
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    return taken(examples, order)
