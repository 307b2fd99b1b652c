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


GROUPED = 50  # batches whose rows are sorted together: as transformers groups by length


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune; the defaults are the paper's LoRA setting (docs/method.md, sections 1 and 6).

    batch_size: examples of one forward pass. accumulation: forward passes of one optimizer step. warmup: share of
    the steps with a rising learning rate; then it falls linearly. rank: of the adapters, on every linear of
    every decoder layer; 0 trains all weights. group_by_length: rows of a batch of about one length, which saves
    padding. Raises InvalidArgument.
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
    def rows_a_step(self) -> int:
        """Examples that one optimizer step sees."""
        return self.batch_size * self.accumulation

    def widened(self, factor: int) -> Recipe:
        """With `factor` times the rank, and with alpha times its root, as rank-stabilised LoRA has it (Kalajdzievski
        2023): at equal alpha / rank a wide adapter would need a lower learning rate."""
        return dataclasses.replace(self, rank=self.rank * factor, alpha=round(self.alpha * factor**0.5))

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def schedule(rows: Sequence[Row], steps: int, recipe: Recipe) -> list[Row]:
    """The rows in the order in which `steps` optimizer steps use them, each epoch shuffled anew by the seed.

    A probe takes the first of them and the pruned model goes on with the rest: one budget. Raises InvalidArgument.
    """
    if not rows:
        raise InvalidArgument("rows is empty; expected at least one training example")
    check_int("steps", steps, 1, "a number of optimizer steps")
    shuffler, ordered = random.Random(recipe.seed), list[Row]()
    while len(ordered) < steps * recipe.rows_a_step:
        epoch = list(rows)
        shuffler.shuffle(epoch)
        ordered += epoch
    ordered = ordered[: steps * recipe.rows_a_step]
    return _grouped(ordered, recipe.batch_size, shuffler) if recipe.group_by_length else ordered


def _grouped(ordered: list[Row], batch_size: int, shuffler: random.Random) -> list[Row]:
    """The same rows, sorted by length within every `GROUPED` batches, those batches in random order."""
    result = list[Row]()
    for start in range(0, len(ordered), GROUPED * batch_size):
        part = sorted(ordered[start : start + GROUPED * batch_size], key=lambda row: len(row["input_ids"]))
        batches = [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
        shuffler.shuffle(batches)
        result += [row for batch in batches for row in batch]
    return result
