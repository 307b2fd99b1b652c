"""The order in which a training uses its rows."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np

from gradpruner.checks import check_int, is_number
from gradpruner.data.row_facts import fact
from gradpruner.errors import InvalidArgument
from gradpruner.storage.provenance import digest
from gradpruner.training.recipe import Recipe

Row = Mapping[str, Any]
Indices = np.ndarray[Any, np.dtype[np.int64]]
GROUPED = 50  # batches whose rows are sorted together, as in transformers' group_by_length


class Ordered(Sequence[Row]):
    """Rows in the order of their use. They are not copied: a row is read when it is asked for.

    Two of them are equal if all their rows are.

    Args:
        rows: tokenised rows.
        indices: which row is used when, of shape (uses,).
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, rows: Sequence[Row], indices: Indices) -> None:
        self.rows, self.indices = rows, indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Ordered: ...
    def __getitem__(self, index: int | slice) -> Row | Ordered:
        if isinstance(index, slice):
            return Ordered(self.rows, self.indices[index])
        return self.rows[int(self.indices[index])]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    def fact(self, name: str) -> np.ndarray[Any, Any]:
        """Return one number for every use of a row, see `gradpruner.data.row_facts`."""
        return fact(self.rows, name)[self.indices]

    def digest(self) -> str:
        """Return 16 hexadecimal digits that identify the content of the rows and their order."""
        content = getattr(self.rows, "content", None)
        used, places = np.unique(self.indices, return_inverse=True)
        if content is None:
            content = digest([self.rows[int(index)] for index in used])
        else:  # rows on disk: all of them, and which are used
            places = self.indices
        return hashlib.sha256(content.encode() + places.astype("<i8").tobytes()).hexdigest()[:16]

    def padded(self, batch_size: int, multiple: int) -> float:
        """Return the share of a training's tokens that are padding, 0 to 1.

        Args:
            batch_size: rows of one batch. They are padded to the longest of them.
            multiple: the padded length is a multiple of this number.
        """
        lengths = self.fact("length").astype(np.int64)
        longest = np.maximum.reduceat(lengths, np.arange(0, len(lengths), batch_size))
        rows = np.full(len(longest), batch_size)
        rows[-1] = len(lengths) - batch_size * (len(longest) - 1)
        return 1 - float(lengths.sum() / (rows * (-(-longest // multiple) * multiple)).sum())


def digest_of_rows(ordered: Sequence[Row]) -> str:
    """Return 16 hexadecimal digits that identify rows and their order."""
    return ordered.digest() if isinstance(ordered, Ordered) else digest(list(ordered))


def schedule(rows: Sequence[Row], steps: int, recipe: Recipe) -> Ordered:
    """Return the rows in the order in which the optimizer steps use them.

    Each epoch is shuffled anew. A probe takes the first of the rows and the pruned model goes on with the rest, so both
    together see what the dense model sees. The order depends only on the recipe, the number of rows and, if they are
    grouped, their lengths.

    Args:
        rows: tokenised training rows. They are not copied.
        steps: optimizer steps of the whole run.
        recipe: batch size and seed.

    Raises:
        InvalidArgument: there are no rows, or `steps` is below 1.
    """
    if not len(rows):
        raise InvalidArgument("rows is empty; expected at least one training example")
    check_int("steps", steps, 1, "a number of optimizer steps")
    uses, shuffler, epochs, ordered = steps * recipe.rows_per_step, random.Random(recipe.seed), list[Indices](), 0
    while ordered < uses:
        epoch = list(range(len(rows)))
        shuffler.shuffle(epoch)
        epochs.append(np.array(epoch, dtype=np.int64))
        ordered += len(epoch)
    indices = np.concatenate(epochs)[:uses]
    if recipe.group_by_length:
        indices = _grouped(indices, fact(rows, "length"), recipe.batch_size, shuffler)
    return Ordered(rows, indices)


def steps_of_epochs(rows: Sequence[Row], epochs: float, recipe: Recipe) -> int:
    """Return the optimizer steps in which every row is used `epochs` times.

    The last step is filled up with the beginning of another epoch.

    Args:
        rows: tokenised training rows.
        epochs: how often every row is used, for example 3 or 0.5.
        recipe: its batch size and accumulation say how many rows a step uses.

    Raises:
        InvalidArgument: there are no rows, or `epochs` is not above 0.
    """
    if not len(rows):
        raise InvalidArgument("rows is empty; expected at least one training example")
    if not is_number(epochs) or not 0 < epochs < math.inf:
        raise InvalidArgument(f"epochs is {epochs!r}; accepted: a number above 0")
    return max(1, math.ceil(round(epochs * len(rows) / recipe.rows_per_step, 9)))


def _grouped(indices: Indices, lengths: Any, batch_size: int, shuffler: random.Random) -> Indices:
    """Sort the rows by length within every `GROUPED` batches. Shuffle those batches."""
    result = []
    for start in range(0, len(indices), GROUPED * batch_size):
        part = indices[start : start + GROUPED * batch_size]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches = [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
        shuffler.shuffle(batches)
        result += batches
    return np.concatenate(result)
