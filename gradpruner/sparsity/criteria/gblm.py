"""Criterion "gblm": weight times activation, plus weight times gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gradpruner.checks import check_bool, is_number
from gradpruner.errors import InvalidArgument
from gradpruner.sparsity.checks import check_norm
from gradpruner.sparsity.criteria.base import ImportanceTerms, Metric, register
from gradpruner.sparsity.statistics import NORMS, LinearStatistics


@register
@dataclass(frozen=True)
class Gblm(Metric):
    """Importance |W| · (‖X‖₂ + α · ‖g‖_p).

    The norm of the gradient g is taken over samples, entry by entry. ‖g‖₁ is the sum over samples of |g|, and ‖g‖₂ the
    root of the sum of g². Neither is divided by the number of samples. Signs never cancel between samples. ‖X‖₂ is as
    in Wanda, the root of a mean over sequences.

    Args:
        p: 1 or 2. Default 2.
        alpha: α, a number above 0. Default 100.
        activations: False leaves ‖X‖₂ out. Default True.

    Raises:
        InvalidArgument: an option is not one of these values.

    Source: docs/method.md, section 7 (Das et al. 2023, GBLM-Pruner).
    """

    p: int = 2
    alpha: float = 100.0
    activations: bool = True
    name: ClassVar[str] = "gblm"

    def __post_init__(self) -> None:
        """Check the options before time is spent."""
        check_norm(self.p)
        if not is_number(self.alpha) or not 0 < self.alpha < float("inf"):
            raise InvalidArgument(f"alpha = {self.alpha!r}; expected a number above 0")
        check_bool("activations", self.activations)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The norms of the inputs, unless only gradients count."""
        return frozenset({NORMS} if self.activations else ())

    @property
    def gradients(self) -> int:  # type: ignore[override]
        """The norm over samples that is asked for."""
        return self.p

    def terms(self, statistics: LinearStatistics) -> ImportanceTerms:
        """The norms of the inputs and of the gradients."""
        norms = statistics.norms if self.activations else None
        return ImportanceTerms(norms, statistics.gradients, float(self.alpha))
