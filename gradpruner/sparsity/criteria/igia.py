"""igia: weight times what a probe of this package saw of it while the model was fine-tuned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gradpruner.sparsity.criteria.base import Metric, Terms, register
from gradpruner.sparsity.statistics import Seen


@register
@dataclass(frozen=True)
class IgiaTimesWeight(Metric):
    """abs(W) * F, with F as the merge ranks by (docs/method.md, section 1). It needs importance. Source: D."""

    name: ClassVar[str] = "igia"
    importance: ClassVar[bool] = True

    def terms(self, seen: Seen) -> Terms:
        """F in the place of a gradient."""
        return None, seen.grads, 1.0
