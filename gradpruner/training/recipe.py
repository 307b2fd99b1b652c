"""The recipe of a training: steps, batch size, learning rate, order of the rows."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from typing import Any

from gradpruner.checks import check_int
from gradpruner.errors import InvalidArgument


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
