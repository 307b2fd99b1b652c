"""magnitude: the smallest weights go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gradpruner.sparsity.criteria.base import Metric, Terms, register
from gradpruner.sparsity.statistics import Seen


@register
@dataclass(frozen=True)
class Magnitude(Metric):
    """abs(W). Source: docs/method.md, section 7 (there over the whole matrix: pattern "matrix")."""

    name: ClassVar[str] = "magnitude"

    def terms(self, seen: Seen) -> Terms:
        """The weight alone."""
        return None, None, 1.0
