"""The order of the rows: as it always was, without copies of the rows."""

from __future__ import annotations

import random

import numpy as np
import pytest

from gradpruner.errors import InvalidArgument
from gradpruner.training.recipe import Recipe
from gradpruner.training.schedule import GROUPED, Ordered, digest_of_rows, schedule, steps_of_epochs


def rows(count):
    lengths = random.Random(7)
    return [{"input_ids": [number] * lengths.randrange(1, 30), "number": number} for number in range(count)]


def order_by_lists(rows, steps, recipe):
    """The order, made of lists of the rows themselves. Folders of earlier runs depend on it."""
    shuffler, ordered = random.Random(recipe.seed), []
    while len(ordered) < steps * recipe.rows_per_step:
        epoch = list(rows)
        shuffler.shuffle(epoch)
        ordered += epoch
    ordered = ordered[: steps * recipe.rows_per_step]
    if not recipe.group_by_length:
        return ordered
    result = []
    for start in range(0, len(ordered), GROUPED * recipe.batch_size):
        part = sorted(ordered[start : start + GROUPED * recipe.batch_size], key=lambda row: len(row["input_ids"]))
        batches = [part[i : i + recipe.batch_size] for i in range(0, len(part), recipe.batch_size)]
        shuffler.shuffle(batches)
        result += [row for batch in batches for row in batch]
    return result


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("count", "steps", "batch", "accumulation"), [(1, 3, 2, 1), (10, 7, 3, 2), (700, 150, 4, 2)])
@pytest.mark.parametrize("seed", [0, 5])
def test_the_order_is_that_of_lists(count, steps, batch, accumulation, seed, grouped):
    recipe = Recipe(batch_size=batch, accumulation=accumulation, seed=seed, group_by_length=grouped)
    data = rows(count)
    ordered = schedule(data, steps, recipe)
    expected = order_by_lists(data, steps, recipe)
    assert [row["number"] for row in ordered] == [row["number"] for row in expected]
    assert all(mine is theirs for mine, theirs in zip(ordered, expected, strict=True))  # no copies


def test_a_sequence_without_copies():
    data = rows(10)
    ordered = schedule(data, 5, Recipe(batch_size=3))
    part = ordered[2:9]
    assert isinstance(part, Ordered) and part.rows is data and len(part) == 7
    assert list(part) == list(ordered)[2:9] and ordered[-1] is list(ordered)[-1]
    assert part == list(part) and list(part) == part and part != ordered[1:8] and part != part[1:] and part != 3
    assert part.fact("length").tolist() == [len(row["input_ids"]) for row in part]
    with pytest.raises(IndexError):
        ordered[15]


def test_the_digest_is_of_content_and_order():
    recipe = Recipe(batch_size=3)
    one, same = schedule(rows(10), 5, recipe), schedule(rows(10), 5, recipe)
    other = rows(10)
    other[3]["number"] = 99
    digests = [
        one.digest(),
        schedule(other, 5, recipe).digest(),
        schedule(rows(10), 5, Recipe(batch_size=3, seed=1)).digest(),
        one[1:].digest(),
    ]
    assert one.digest() == same.digest() == digest_of_rows(one) and len(set(digests)) == 4
    assert digest_of_rows(list(one)) == digest_of_rows(list(same))
    changed, unused = rows(10), next(i for i in range(10) if i not in one.indices[:3])
    changed[unused]["number"] = 99
    assert schedule(changed, 5, recipe)[:3].digest() == one[:3].digest()


def test_the_share_of_padding():
    data = [{"input_ids": [1] * length} for length in (1, 8, 9, 4)]
    ordered = Ordered(data, np.arange(4))
    assert ordered.padded(2, 8) == 1 - 22 / (2 * 8 + 2 * 16)
    assert ordered[:3].padded(2, 8) == 1 - 18 / (2 * 8 + 16)


@pytest.mark.parametrize(
    ("count", "epochs", "steps"),
    [(10, 1, 2), (12, 1, 2), (13, 1, 3), (10, 3, 5), (10, 0.5, 1), (60, 0.1, 1), (1, 1, 1)],
)
def test_steps_of_epochs(count, epochs, steps):
    assert steps_of_epochs(rows(count), epochs, Recipe(batch_size=3, accumulation=2)) == steps


@pytest.mark.parametrize("epochs", [0, -1, True, "2", float("inf"), float("nan")])
def test_epochs_that_are_refused(epochs):
    with pytest.raises(InvalidArgument, match="epochs"):
        steps_of_epochs(rows(3), epochs, Recipe())
    with pytest.raises(InvalidArgument, match="rows is empty"):
        steps_of_epochs([], 1, Recipe())
