"""Criterion "dsnot": refine a mask until each output is right on average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradpruner import ops
from gradpruner.checkpoint.mask_bits import pack, unpack
from gradpruner.checks import check_bool, check_choice, check_int, is_number
from gradpruner.errors import InvalidArgument
from gradpruner.sparsity.criteria.base import CRITERIA, Criterion, Metric, register
from gradpruner.sparsity.pattern import Pattern
from gradpruner.sparsity.statistics import MOMENTS, NORMS, LinearStatistics

INFINITY = float("inf")


@register
@dataclass(frozen=True)
class DsNoT(Criterion):
    """Exchange zeroed for kept entries of a row while its mean output error is large.

    Entry (i, j) contributes c[i, j] = W[i, j] · s[j] to the mean output of row i, where s[j] is the mean over
    sequences of the sum of input j. The error of a row is the sum of c over its zeroed entries. Each exchange

    1. restores the zeroed entry that lowers the error most, relative to the variance of its input, and
    2. zeroes the kept entry with the smallest |W| · ‖X‖₂ among those whose removal lowers the error too. For N:M it
       is one of the same group.

    No entry moves twice. Nothing is trained. Pattern "matrix" is refused.

    Args:
        start: the criterion of the first mask, "magnitude" or "wanda". Default "wanda".
        cycles: exchanges per row, at most. Default 50.
        threshold: a row is done when its absolute error is not above this, 0 or more. Default 0.1.
        overshoot: whether a row goes on after an exchange that turns the sign of its error. Default False: that
            exchange is not made, and the row is done. The authors' code has True for rows and False for N:M.

    Raises:
        InvalidArgument: an option is not one of these values.

    Source: docs/method.md, section 7 (Zhang et al. 2023, Dynamic Sparse No Training).
    """

    start: str = "wanda"
    cycles: int = 50
    threshold: float = 0.1
    overshoot: bool = False
    name: ClassVar[str] = "dsnot"
    needs: ClassVar[frozenset[str]] = frozenset({NORMS, MOMENTS})
    within_matrix: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the options before time is spent."""
        check_choice("start", self.start, ("magnitude", "wanda"))
        check_int("cycles", self.cycles, 0)
        if not is_number(self.threshold) or not self.threshold >= 0:
            raise InvalidArgument(f"threshold = {self.threshold!r}; expected a number, 0 or more")
        check_bool("overshoot", self.overshoot)

    def prune_(self, weight: Tensor, statistics: LinearStatistics, pattern: Pattern) -> Tensor:
        """Zero the entries that the refined mask leaves out.

        Args:
            weight: (out, in), changed in place.
            statistics: norms, sums and variances of the inputs.
            pattern: "row" or "N:M", see `Pattern`.

        Returns:
            The mask of the entries that stay.
        """
        assert statistics.norms is not None and statistics.sums is not None and statistics.variances is not None
        first = CRITERIA[self.start]()
        assert isinstance(first, Metric)
        width = weight.shape[1]
        kept = unpack(pattern.prune_(weight.clone(), *first.terms(statistics)), width)
        contribution = weight.float() * statistics.sums
        # very large for an input that never changes; 0 for one that is always zero (0 / 0)
        gain = (contribution / statistics.variances).nan_to_num(nan=0.0)
        cost = ops.weight_importance(weight, statistics.norms, None, 1.0)
        mask = pack(self._exchange(kept, contribution, gain, cost, pattern.groups(width)[1]))
        ops.apply_mask_(weight, mask)
        return mask

    def _exchange(self, kept: Tensor, contribution: Tensor, gain: Tensor, cost: Tensor, group: int) -> Tensor:
        """Refine a mask in place and return it.

        Args:
            kept: the first mask, boolean (out, in).
            contribution: c of every entry, float32 (out, in).
            gain: c of every entry over the variance of its input.
            cost: |W| · ‖X‖₂ of every entry.
            group: how many consecutive inputs an exchange stays within.
        """
        group_of = torch.arange(kept.shape[1], device=kept.device) // group
        movable, error = torch.ones_like(kept), torch.where(kept, 0.0, contribution).sum(1)
        unfinished = error.abs() > self.threshold
        for _ in range(self.cycles):
            rows = unfinished.nonzero().flatten()  # few after some cycles
            if not len(rows):
                break
            sign, c, stays, may_move = error[rows].sign()[:, None], contribution[rows], kept[rows], movable[rows]
            # 1. the zeroed entry to restore
            lowers = may_move & ~stays & (c * sign > 0)
            restored, best = _lowest(torch.where(lowers, -gain[rows] * sign, INFINITY))
            # 2. the kept entry to zero in its place
            lowers = may_move & stays & (c * sign < 0) & (group_of == group_of[restored][:, None])
            zeroed, least = _lowest(torch.where(lowers, cost[rows], INFINITY))
            # 3. which rows make the exchange, and which are done
            exchanged = (best < INFINITY) & (least < INFINITY)
            after = error[rows] + contribution[rows, zeroed] - contribution[rows, restored]
            done = best == INFINITY
            if not self.overshoot:
                done |= exchanged & (after.sign() * error[rows].sign() < 0)
                exchanged &= ~done
            movable[rows, restored] = False  # also where no entry can be zeroed for it
            movable[rows[exchanged], zeroed[exchanged]] = False
            kept[rows[exchanged], restored[exchanged]] = True
            kept[rows[exchanged], zeroed[exchanged]] = False
            error[rows[exchanged]] = after[exchanged]
            unfinished[rows] = ~done & (error[rows].abs() > self.threshold)
        return kept


def _lowest(cost: Tensor) -> tuple[Tensor, Tensor]:
    """The column of the lowest entry of each row, int64 (out,), and that entry, float32 (out,)."""
    lowest, column = cost.min(1)
    return column, lowest
