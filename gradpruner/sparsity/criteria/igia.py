"""Criterion "igia": weight times the importance that a probe accumulated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gradpruner.sparsity.criteria.base import ImportanceTerms, Metric, register
from gradpruner.sparsity.statistics import LinearStatistics


@register
@dataclass(frozen=True)
class IgiaTimesWeight(Metric):
    """Importance |W| · F. F is the squared gradient, summed over the steps of a probe.

    Merges rank entries by the same F. It needs an `Igia` with the importance of every weight.

    Source: docs/method.md, section 1. The use for single weights is this project's own.
    """

    name: ClassVar[str] = "igia"
    importance: ClassVar[bool] = True

    def terms(self, statistics: LinearStatistics) -> ImportanceTerms:
        """F takes the place of the gradient."""
        return ImportanceTerms(gradients=statistics.gradients)
