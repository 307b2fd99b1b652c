"""The order in which a training uses its rows."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from gradpruner.checks import check_int
from gradpruner.errors import InvalidArgument
from gradpruner.training.recipe import Recipe

Row = Mapping[str, Any]
GROUPED = 50  # batches whose rows are sorted together, as in transformers' group_by_length


def schedule(rows: Sequence[Row], steps: int, recipe: Recipe) -> list[Row]:
    """Return the rows in the order in which the optimizer steps use them.

    Each epoch is shuffled anew. A probe takes the first of the rows and the pruned model goes on with the rest, so both
    together see what the dense model sees.

    Args:
        rows: tokenised training rows.
        steps: optimizer steps of the whole run.
        recipe: batch size and seed.

    Raises:
        InvalidArgument: there are no rows, or `steps` is below 1.
    """
    if not rows:
        raise InvalidArgument("rows is empty; expected at least one training example")
    check_int("steps", steps, 1, "a number of optimizer steps")
    shuffler, ordered = random.Random(recipe.seed), list[Row]()
    while len(ordered) < steps * recipe.rows_per_step:
        epoch = list(rows)
        shuffler.shuffle(epoch)
        ordered += epoch
    ordered = ordered[: steps * recipe.rows_per_step]
    return _grouped(ordered, recipe.batch_size, shuffler) if recipe.group_by_length else ordered


def steps_of_epochs(rows: Sequence[Any], epochs: float, recipe: Recipe) -> int:
    """Return how many optimizer steps see all rows `epochs` times. The last step may go beyond.

    Args:
        rows: what is trained on.
        epochs: how often each row is seen, for example 3 or 0.5.
        recipe: its batch size and accumulation say how many rows a step sees.

    Raises:
        InvalidArgument: there are no rows, or `epochs` is not above 0.
    """
    if not rows or not 0 < epochs < math.inf:
        raise InvalidArgument(f"epochs = {epochs!r} of {len(rows)} training rows; expected a number above 0, and rows")
    return math.ceil(round(epochs * len(rows) / recipe.rows_per_step, 9))


def _grouped(ordered: list[Row], batch_size: int, shuffler: random.Random) -> list[Row]:
    """Sort the rows by length within every `GROUPED` batches. Shuffle those batches."""
    result = list[Row]()
    for start in range(0, len(ordered), GROUPED * batch_size):
        part = sorted(ordered[start : start + GROUPED * batch_size], key=lambda row: len(row["input_ids"]))
        batches = [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
        shuffler.shuffle(batches)
        result += [row for batch in batches for row in batch]
    return result
