"""wanda: the weights that move the output least, one at a time, on the inputs that were seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gradpruner.sparsity.criteria.base import Metric, Terms, register
from gradpruner.sparsity.statistics import NORMS, Seen


@register
@dataclass(frozen=True)
class Wanda(Metric):
    """abs(W[i, j]) * norm2(x[:, j]). Source: docs/method.md, section 7 (Sun et al. 2024)."""

    name: ClassVar[str] = "wanda"
    needs: ClassVar[frozenset[str]] = frozenset({NORMS})

    def terms(self, seen: Seen) -> Terms:
        """The norms of the inputs."""
        return seen.norms, None, 1.0
