"""Patterns: how many weights of a matrix are zeroed, and among which the choice is made."""

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
    """How many entries of a weight (out, in) are zeroed, and among which the choice is made.

    Counts are exact: floor(ratio · entries) entries are zeroed. Of equally important entries, the one with the lower
    index stays.

    Args:
        within: "row" chooses among all inputs of one output, "matrix" among all entries, "N:M" (such as "2:4") keeps N
            of every M consecutive inputs. Default "row".
        ratio: share of the entries that is zeroed, from 0 to below 1. "row" and "matrix" need one (`Pattern.of` has a
            default). For N:M it is 1 - N / M, and may be None.

    Raises:
        InvalidArgument: `within` is not known, or `ratio` is no such share or not that of N:M.

    Example:
        Pattern("2:4")
    """

    within: str = "row"
    ratio: float | None = None

    def __post_init__(self) -> None:
        """Check the pattern and its share against each other."""
        n, m = self._n_of_m()
        if not m and self.within not in WITHIN:
            raise InvalidArgument(f"pattern = {self.within!r}; accepted are row, matrix, and N:M (2:4, 4:8, ...)")
        if m and not 0 < n < m:
            raise InvalidArgument(f"pattern = {self.within!r}; expected N:M with N from 1 to M - 1")
        if m and self.ratio is None:
            return
        if not is_number(self.ratio) or not 0 <= self.ratio < 1:
            raise InvalidArgument(f"ratio = {self.ratio!r}; accepted is a share of the weights, from 0 to below 1")
        if m and Fraction(str(self.ratio)) != 1 - Fraction(n, m):
            raise InvalidArgument(f"ratio = {self.ratio!r}; expected none, or {1 - n / m}, that of {self.within}")

    @classmethod
    def of(cls, within: str, ratio: float | None) -> Pattern:
        """Make a pattern whose share may be left out.

        Args:
            within: "row", "matrix" or "N:M".
            ratio: share that is zeroed. None means 0.5 for "row" and "matrix".

        Returns:
            The pattern.

        Raises:
            InvalidArgument: as in `Pattern`.
        """
        return cls(within, 0.5 if ratio is None and within in WITHIN else ratio)

    def _n_of_m(self) -> tuple[int, int]:
        """N and M, or 0 and 0 for another pattern."""
        match = re.fullmatch(r"(\d+):(\d+)", self.within) if isinstance(self.within, str) else None
        return (int(match[1]), int(match[2])) if match else (0, 0)

    @property
    def is_n_of_m(self) -> bool:
        """Whether the choice is made among every M consecutive inputs."""
        return self._n_of_m()[1] > 0

    @property
    def share(self) -> Fraction:
        """The share that is zeroed, exactly as it was written: 0.57 of 100 is 57."""
        n, m = self._n_of_m()
        return 1 - Fraction(n, m) if m else Fraction(str(self.ratio))

    def __str__(self) -> str:
        """The pattern for people, such as "2:4" or "0.5 of each row"."""
        return self.within if self.is_n_of_m else f"{float(self.share):.6g} of each {self.within}"

    def with_ratio(self, ratio: float) -> Pattern:
        """The same pattern with another share.

        Args:
            ratio: share that is zeroed.

        Returns:
            A new pattern.

        Raises:
            InvalidArgument: the pattern is N:M, whose share is fixed.
        """
        if self.is_n_of_m:
            raise InvalidArgument(
                f"pattern = {self.within!r}: every matrix has the share of N:M; expected row or matrix"
            )
        return dataclasses.replace(self, ratio=ratio)

    def check(self, name: str, width: int) -> None:
        """Check that a weight fits the pattern.

        Args:
            name: the weight's path, for the message.
            width: its number of inputs.

        Raises:
            InvalidArgument: the pattern is N:M, and M does not divide `width`.
        """
        _, m = self._n_of_m()
        if m and width % m:
            raise InvalidArgument(f"pattern = {self.within!r}: {name} has {width} inputs; expected a multiple of {m}")

    def groups(self, width: int) -> tuple[int, int]:
        """Describe the pattern by groups of consecutive inputs of a row. Not for "matrix".

        Args:
            width: number of inputs.

        Returns:
            (kept, group): of every `group` consecutive inputs, `kept` stay.
        """
        n, m = self._n_of_m()
        return (n, m) if m else (width - int(self.share * width), width)

    def prune_(self, weight: Tensor, norms: Tensor | None, gradients: Tensor | None, alpha: float) -> Tensor:
        """Zero the least important entries of a weight, in place.

        The importance of entry (i, j) is |W[i, j]| · (norms[j] + alpha · gradients[i, j]), see `ImportanceTerms`.

        Args:
            weight: (out, in), any float dtype.
            norms: float32 (in,), or None.
            gradients: float32 (out, in), or None.
            alpha: factor of the gradients.

        Returns:
            The mask of the entries that stay: uint8 (out, ceil(in / 8)), one bit per entry.

        Raises:
            InvalidArgument: dtypes, shapes or devices do not fit, or the pattern is N:M and M does not divide the
                number of inputs.
        """
        if self.within != "matrix":
            return ops.prune_groups_(weight, norms, gradients, alpha, *self.groups(weight.shape[1]))
        importance = ops.weight_importance(weight, norms, gradients, alpha)
        mask = pack(largest(importance, weight.numel() - int(self.share * weight.numel())))
        ops.apply_mask_(weight, mask)
        return mask


def largest(importance: Tensor, kept: int) -> Tensor:
    """Find the largest entries. Of equal entries, the one with the lower index is taken.

    Args:
        importance: float32 (out, in).
        kept: how many entries are taken.

    Returns:
        Boolean (out, in), true for exactly `kept` entries.
    """
    value, index = ops.threshold(importance, kept)
    flat = importance.flatten()
    ties = flat == value
    ties[int(index) + 1 :] = False
    taken = (flat > value) | ties
    lacking = kept - int(taken.sum())
    if lacking:  # fewer entries are above zero than are to be taken: take the first of the others too
        others = ~taken
        taken |= others & (others.cumsum(0) <= lacking)
    return taken.view(importance.shape)
