"""The recipe of a training: steps, batch size, learning rate, order of the rows."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gradpruner.checks import check_int
from gradpruner.errors import InvalidArgument

Row = Mapping[str, Any]


GROUPED = 50  # batches whose rows are sorted together, as in transformers' group_by_length


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune. The defaults are the paper's LoRA setting.

    Args:
        batch_size: examples of one forward pass. Default 16.
        accumulation: forward passes of one optimizer step. Default 1.
        learning_rate: the highest learning rate. Default 1e-4.
        weight_decay: of AdamW. Default 0.1.
        warmup: share of the steps in which the learning rate rises. Afterwards it falls linearly. Default 0.03.
        max_grad_norm: gradients are clipped to this norm. Default 1.
        rank: rank of the LoRA adapters, which are on every linear of every decoder layer. 0 trains all weights.
            Default 8.
        alpha: numerator of LoRA's scale, alpha / rank. Default 32.
        seed: of the order of the rows and of the adapters. Default 0.
        group_by_length: whether the rows of a batch have about one length, which saves padding. Default False.

    Raises:
        InvalidArgument: a value is not accepted.

    Source: docs/method.md, sections 1 and 6.
    """

    batch_size: int = 16
    accumulation: int = 1
    learning_rate: float = 1e-4
    weight_decay: float = 0.1
    warmup: float = 0.03
    max_grad_norm: float = 1.0
    rank: int = 8
    alpha: int = 32
    seed: int = 0
    group_by_length: bool = False

    def __post_init__(self) -> None:
        """Check every value by name."""
        for name, least in (("batch_size", 1), ("accumulation", 1), ("rank", 0), ("alpha", 1), ("seed", 0)):
            check_int(name, getattr(self, name), least)
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise InvalidArgument(f"{name} = {getattr(self, name)!r}; expected a number above 0")
        if not 0 <= self.warmup < 1:
            raise InvalidArgument(f"warmup = {self.warmup!r}; accepted is a share from 0 to below 1")
        if self.weight_decay < 0:
            raise InvalidArgument(f"weight_decay = {self.weight_decay!r}; expected 0 or more")

    @property
    def rows_per_step(self) -> int:
        """Examples that one optimizer step sees."""
        return self.batch_size * self.accumulation

    def widened(self, factor: int) -> Recipe:
        """Return the recipe with `factor` times the rank and sqrt(`factor`) times alpha.

        At equal alpha / rank, a wide adapter would need a lower learning rate.

        Source: rank-stabilised LoRA, Kalajdzievski 2023.
        """
        return dataclasses.replace(self, rank=self.rank * factor, alpha=round(self.alpha * factor**0.5))

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON holds it."""
        return asdict(self)


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


def _grouped(ordered: list[Row], batch_size: int, shuffler: random.Random) -> list[Row]:
    """Sort the rows by length within every `GROUPED` batches. Shuffle those batches."""
    result = list[Row]()
    for start in range(0, len(ordered), GROUPED * batch_size):
        part = sorted(ordered[start : start + GROUPED * batch_size], key=lambda row: len(row["input_ids"]))
        batches = [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
        shuffler.shuffle(batches)
        result += [row for batch in batches for row in batch]
    return result
