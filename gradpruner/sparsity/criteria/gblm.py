"""gblm: weight times gradient, samples taken one by one, beside weight times activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gradpruner.checks import is_number
from gradpruner.errors import InvalidArgument
from gradpruner.sparsity.criteria.base import Metric, Terms, register
from gradpruner.sparsity.statistics import NORMS, Seen


@register
@dataclass(frozen=True)
class Gblm(Metric):
    """abs(W) * (norm2(x) + alpha * norm_p of the gradients over samples), not divided by their number.

    p: 1 or 2. activations: without them it is abs(W) * norm_p alone. Raises InvalidArgument.
    Source: docs/method.md, section 7 (Das et al. 2023).
    """

    p: int = 2
    alpha: float = 100.0
    activations: bool = True
    name: ClassVar[str] = "gblm"

    def __post_init__(self) -> None:
        """Check the options."""
        if self.p not in (1, 2) or isinstance(self.p, bool):
            raise InvalidArgument(f"p = {self.p!r}; accepted are 1 and 2, the norm over samples")
        number = is_number(self.alpha)
        if not number or not 0 < self.alpha < float("inf"):
            raise InvalidArgument(f"alpha = {self.alpha!r}; expected a number above 0")
        if not isinstance(self.activations, bool):
            raise InvalidArgument(f"activations = {self.activations!r}; accepted are true and false")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Norms of the inputs, unless only gradients count."""
        return frozenset({NORMS} if self.activations else ())

    @property
    def gradients(self) -> int:  # type: ignore[override]
        """The norm over samples."""
        return self.p

    def terms(self, seen: Seen) -> Terms:
        """Norms of inputs and gradients."""
        return (seen.norms if self.activations else None), seen.grads, float(self.alpha)
