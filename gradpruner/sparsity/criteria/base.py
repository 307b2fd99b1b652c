"""What all criteria have in common: a weight and what was seen of it in, zeros and a mask out."""

from __future__ import annotations

import abc
from typing import ClassVar

from torch import Tensor

from gradpruner import named_options as spelling
from gradpruner.sparsity.pattern import Pattern
from gradpruner.sparsity.statistics import Seen

Terms = tuple[Tensor | None, Tensor | None, float]  # norms, grads, alpha: see `gradpruner.ops.weight_importance`


class Criterion(abc.ABC):
    """Which weights go; a subclass is a frozen dataclass whose fields are its options.

    needs: what it asks for of the inputs of a linear (see `Seen`). gradients: 1 or 2, the norm over samples of the
    gradient that it asks for, 0 for none. importance: whether it asks for a probe's. within_matrix: whether it can
    choose among a whole matrix.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    gradients: int = 0
    importance: ClassVar[bool] = False
    within_matrix: ClassVar[bool] = True

    @abc.abstractmethod
    def prune_(self, weight: Tensor, seen: Seen, pattern: Pattern) -> Tensor:
        """Zero entries of `weight` (out, in) in place, and change the others where the method does; the mask."""

    def __str__(self) -> str:
        """As `parse_criterion` reads it: the name and every option that is not as by default."""
        return spelling.spelled(self.name, self)


class Metric(Criterion):
    """A criterion that gives every entry an importance, and keeps the highest as they are."""

    @abc.abstractmethod
    def terms(self, seen: Seen) -> Terms:
        """What the importance of an entry is made of."""

    def prune_(self, weight: Tensor, seen: Seen, pattern: Pattern) -> Tensor:
        """Zero the least important entries."""
        return pattern.prune_(weight, *self.terms(seen))


CRITERIA: dict[str, type[Criterion]] = {}


def register(criterion: type[Criterion]) -> type[Criterion]:
    """Make a criterion known by its name."""
    CRITERIA[criterion.name] = criterion
    return criterion


def parse_criterion(text: str) -> Criterion:
    """A criterion from "name" or "name:option=value,option=value". Raises InvalidArgument for what it does not know."""
    return spelling.parse(text, CRITERIA)
