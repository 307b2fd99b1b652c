"""Criterion "wanda": zero the weights that, one at a time, change the layer's output least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gradpruner.sparsity.criteria.base import ImportanceTerms, Metric, register
from gradpruner.sparsity.statistics import NORMS, LinearStatistics


@register
@dataclass(frozen=True)
class Wanda(Metric):
    """Importance |W| · ‖X‖₂. The norm is that of the input feature over the calibration tokens.

    It is computed as the root of the mean over sequences of the sum of squares. The mean does not change the ranking.

    Source: docs/method.md, section 7 (Sun et al. 2023, Wanda).
    """

    name: ClassVar[str] = "wanda"
    needs: ClassVar[frozenset[str]] = frozenset({NORMS})

    def terms(self, statistics: LinearStatistics) -> ImportanceTerms:
        """The norms of the inputs."""
        return ImportanceTerms(norms=statistics.norms)
