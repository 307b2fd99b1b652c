"""Pattern: how many weights of a matrix go, and among which the choice is made."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from gradpruner import ops
from gradpruner.checkpoint.mask_bits import pack
from gradpruner.checks import is_number
from gradpruner.errors import InvalidArgument

WITHIN = ("row", "matrix")


@dataclass(frozen=True)
class Pattern:
    """What of a weight (out, in) is removed: exactly floor(ratio * entries) of every row, or of the matrix; or N:M.

    within: "row" (all inputs of one output), "matrix", or "N:M": N of every M consecutive inputs stay. ratio: share
    removed, counted exactly; of N:M it is 1 - N / M, and None says so. Of equals the lower index stays.
    Raises InvalidArgument.
    """

    within: str = "row"
    ratio: float | None = None

    def __post_init__(self) -> None:
        """Check both against each other."""
        n, m = self._n_of_m()
        if not m and self.within not in WITHIN:
            raise InvalidArgument(f"pattern = {self.within!r}; accepted are row, matrix, and N:M (2:4, 4:8, ...)")
        if m and not 0 < n < m:
            raise InvalidArgument(f"pattern = {self.within!r}; expected N:M with N from 1 to M - 1")
        if m and self.ratio is None:
            return
        number = is_number(self.ratio)
        if not number or not 0 <= self.ratio < 1:  # type: ignore[operator]
            raise InvalidArgument(f"ratio = {self.ratio!r}; accepted is a share of the weights, from 0 to below 1")
        if m and Fraction(str(self.ratio)) != 1 - Fraction(n, m):
            raise InvalidArgument(f"ratio = {self.ratio!r}; expected none, or {1 - n / m}, that of {self.within}")

    @classmethod
    def of(cls, within: str, ratio: float | None) -> Pattern:
        """With half of the weights removed where neither says another share. Raises InvalidArgument."""
        return cls(within, 0.5 if ratio is None and within in WITHIN else ratio)

    def _n_of_m(self) -> tuple[int, int]:
        found = re.fullmatch(r"(\d+):(\d+)", self.within) if isinstance(self.within, str) else None
        return (int(found[1]), int(found[2])) if found else (0, 0)

    @property
    def is_n_of_m(self) -> bool:
        """Whether the choice is made among every M consecutive inputs."""
        return self._n_of_m()[1] > 0

    @property
    def share(self) -> Fraction:
        """Share that is removed, as it was written: 0.57 of 100 is 57."""
        n, m = self._n_of_m()
        return 1 - Fraction(n, m) if m else Fraction(str(self.ratio))

    def __str__(self) -> str:
        """As a person reads it."""
        return self.within if self.is_n_of_m else f"{float(self.share):.6g} of each {self.within}"

    def with_ratio(self, ratio: float) -> Pattern:
        """The same with another share. Raises InvalidArgument for N:M, which has its own."""
        if self.is_n_of_m:
            raise InvalidArgument(
                f"pattern = {self.within!r}: every matrix has the share of N:M; expected row or matrix"
            )
        return dataclasses.replace(self, ratio=ratio)

    def check(self, name: str, width: int) -> None:
        """Raises InvalidArgument, with the weight's name, if M does not divide its number of inputs."""
        _, m = self._n_of_m()
        if m and width % m:
            raise InvalidArgument(f"pattern = {self.within!r}: {name} has {width} inputs; expected a multiple of {m}")

    def groups(self, width: int) -> tuple[int, int]:
        """(kept, group): of every `group` consecutive inputs of a row `kept` stay. Not for "matrix"."""
        n, m = self._n_of_m()
        return (n, m) if m else (width - int(self.share * width), width)

    def prune_(self, weight: Tensor, norms: Tensor | None, grads: Tensor | None, alpha: float) -> Tensor:
        """Zero the least important entries of `weight` (out, in), in place; returns the mask.

        norms, grads, alpha: what importance is made of, see `gradpruner.ops.prune_groups_`.
        """
        if self.within != "matrix":
            return ops.prune_groups_(weight, norms, grads, alpha, *self.groups(weight.shape[1]))
        importance = ops.weight_importance(weight, norms, grads, alpha)
        mask = pack(largest(importance, weight.numel() - int(self.share * weight.numel())))
        ops.apply_mask_(weight, mask)
        return mask


def largest(importance: Tensor, kept: int) -> Tensor:
    """Which `kept` entries of float32 (out, in) are largest, of equals the lower index: boolean, that shape."""
    value, index = ops.threshold(importance, kept)
    flat = importance.flatten()
    ties = flat == value
    ties[int(index) + 1 :] = False
    found = (flat > value) | ties
    lacking = kept - int(found.sum())
    if lacking:  # fewer positive entries than are to stay: the first of the others stay too
        rest = ~found
        found |= rest & (rest.cumsum(0) <= lacking)
    return found.view(importance.shape)
