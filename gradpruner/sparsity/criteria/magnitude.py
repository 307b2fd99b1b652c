"""Criterion "magnitude": zero the smallest weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gradpruner.sparsity.criteria.base import ImportanceTerms, Metric, register
from gradpruner.sparsity.statistics import LinearStatistics


@register
@dataclass(frozen=True)
class Magnitude(Metric):
    """Importance |W|.

    Magnitude pruning is often meant over the whole matrix. That is pattern "matrix" here.

    Source: docs/method.md, section 7.
    """

    name: ClassVar[str] = "magnitude"

    def terms(self, statistics: LinearStatistics) -> ImportanceTerms:
        """The weight alone: no norms and no gradients."""
        return ImportanceTerms()
