"""The rows of a step, divided over processes."""

from __future__ import annotations

import pytest

from gradpruner.errors import InvalidArgument
from gradpruner.training.recipe import Recipe
from gradpruner.training.shares import share_of


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "processes", "share"),
    [
        (16, 1, 1, (16, 1)),
        (16, 1, 4, (4, 1)),
        (16, 3, 2, (8, 3)),
        (1, 8, 2, (1, 4)),
        (3, 4, 2, (3, 2)),
        (6, 2, 4, (3, 1)),
    ],
)
def test_every_process_has_its_share(batch_size, accumulation, processes, share):
    recipe = Recipe(batch_size=batch_size, accumulation=accumulation)
    own = share_of(recipe, processes)
    assert own == share
    assert own.batch_size * own.accumulation * processes == recipe.rows_per_step
    assert own.batch_size <= batch_size


def test_rows_that_cannot_be_divided():
    with pytest.raises(
        InvalidArgument, match=r"the 9 rows of a step.*over 4 processes.*batch_size = 4 .*or 3 processes"
    ):
        share_of(Recipe(batch_size=3, accumulation=3), 4)
    assert share_of(Recipe(batch_size=4, accumulation=3), 4) == (1, 3)  # what the message advises
