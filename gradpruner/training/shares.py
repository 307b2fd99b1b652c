"""Divide the rows of an optimizer step over processes, so that it sees the same rows."""

from __future__ import annotations

from typing import NamedTuple

from gradpruner.errors import InvalidArgument
from gradpruner.training.recipe import Recipe


class Share(NamedTuple):
    """What one process takes of every optimizer step.

    Args:
        batch_size: rows of one forward pass.
        accumulation: forward passes.
    """

    batch_size: int
    accumulation: int


def share_of(recipe: Recipe, processes: int) -> Share:
    """Return what each of `processes` processes takes of a step of `recipe.rows_per_step` rows.

    Each forward pass is divided if that is possible, else the forward passes are dealt out. No forward pass has more
    rows than in one process.

    Args:
        recipe: batch size and accumulation of one process.
        processes: how many there are.

    Raises:
        InvalidArgument: the rows of a step cannot be divided evenly.
    """
    if recipe.batch_size % processes == 0:
        return Share(recipe.batch_size // processes, recipe.accumulation)
    if recipe.accumulation % processes == 0:
        return Share(recipe.batch_size, recipe.accumulation // processes)
    rows, rest = divmod(recipe.rows_per_step, processes)
    if rest:
        more = processes * (-(-recipe.batch_size // processes))
        fewer = max(count for count in range(1, processes) if recipe.rows_per_step % count == 0)
        raise InvalidArgument(
            f"batch_size = {recipe.batch_size} with accumulation = {recipe.accumulation}: the {recipe.rows_per_step} "
            f"rows of a step cannot be divided evenly over {processes} processes; accepted are, for example, "
            f"batch_size = {more} (--batch-size), accumulation = {processes} (--accumulation), or {fewer} "
            f"process{'' if fewer == 1 else 'es'}"
        )
    batch_size = max(size for size in range(1, recipe.batch_size + 1) if rows % size == 0)
    return Share(batch_size, rows // batch_size)
