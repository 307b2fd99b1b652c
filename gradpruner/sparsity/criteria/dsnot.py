"""dsnot: a mask is refined, entry against entry, until each row's outputs are right on average. No training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradpruner import ops
from gradpruner.checkpoint.mask_bits import pack, unpack
from gradpruner.checks import check_int, is_number
from gradpruner.errors import InvalidArgument
from gradpruner.sparsity.criteria.base import CRITERIA, Criterion, Metric, register
from gradpruner.sparsity.pattern import Pattern
from gradpruner.sparsity.statistics import MOMENTS, NORMS, Seen

INFINITY = float("inf")


@register
@dataclass(frozen=True)
class DsNoT(Criterion):
    """Exchange pruned for kept entries of a row while the mean error of its output is above `threshold`.

    The error of a row is the sum of what its pruned entries gave: W * mean over sequences of the sum of inputs. In
    turn the entry comes back whose return lowers it most for the variance of its input, and the kept entry with the
    smallest abs(W) * norm2(x) goes whose absence lowers it too; for N:M, one of the same group. start: the criterion
    that makes the first mask, magnitude or wanda. cycles: exchanges at most. overshoot: a row goes on where an exchange
    turns the sign of its error; otherwise it is left as it was before that. Raises InvalidArgument.
    Source: docs/method.md, section 7 (Zhang et al. 2024). Not for pattern "matrix".
    """

    start: str = "wanda"
    cycles: int = 50
    threshold: float = 0.1
    overshoot: bool = False  # the authors' code: True in rows, False in N:M
    name: ClassVar[str] = "dsnot"
    needs: ClassVar[frozenset[str]] = frozenset({NORMS, MOMENTS})
    within_matrix: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the options."""
        if self.start not in ("magnitude", "wanda"):
            raise InvalidArgument(f"start = {self.start!r}; accepted are magnitude and wanda")
        check_int("cycles", self.cycles, 0)
        number = is_number(self.threshold)
        if not number or not self.threshold >= 0:
            raise InvalidArgument(f"threshold = {self.threshold!r}; expected a number, 0 or more")
        if not isinstance(self.overshoot, bool):
            raise InvalidArgument(f"overshoot = {self.overshoot!r}; accepted are true and false")

    def prune_(self, weight: Tensor, seen: Seen, pattern: Pattern) -> Tensor:
        """Zero what the refined mask leaves out."""
        assert seen.norms is not None and seen.sums is not None and seen.variances is not None
        first = CRITERIA[self.start]()
        assert isinstance(first, Metric)
        width = weight.shape[1]
        kept = unpack(pattern.prune_(weight.clone(), *first.terms(seen)), width)
        given = weight.float() * seen.sums
        # of an input that never changes worth everything, of one that is always zero nothing
        worth = (given / seen.variances).nan_to_num(nan=0.0)
        cost = ops.weight_importance(weight, seen.norms, None, 1.0)
        mask = pack(self._exchange(kept, given, worth, cost, pattern.groups(width)[1]))
        ops.apply_mask_(weight, mask)
        return mask

    def _exchange(self, kept: Tensor, given: Tensor, worth: Tensor, cost: Tensor, group: int) -> Tensor:
        """The refined mask, boolean (out, in). No entry moves twice."""
        place = torch.arange(kept.shape[1], device=kept.device) // group
        free, error = torch.ones_like(kept), torch.where(kept, 0.0, given).sum(1)
        goes_on = error.abs() > self.threshold
        for _ in range(self.cycles):
            rows = goes_on.nonzero().flatten()  # few after some cycles
            if not len(rows):
                break
            sign, mine, stays = error[rows].sign()[:, None], given[rows], kept[rows]
            open_ = free[rows]
            back, gain = _first(torch.where(open_ & ~stays & (mine * sign > 0), -worth[rows] * sign, INFINITY))
            lowers = open_ & stays & (mine * sign < 0) & (place == place[back][:, None])
            gone, price = _first(torch.where(lowers, cost[rows], INFINITY))
            moves = (gain < INFINITY) & (price < INFINITY)
            after = error[rows] + given[rows, gone] - given[rows, back]
            stops = gain == INFINITY
            if not self.overshoot:
                stops |= moves & (after.sign() * error[rows].sign() < 0)
                moves &= ~stops
            free[rows, back] = False  # also where nothing can go for it
            free[rows[moves], gone[moves]] = False
            kept[rows[moves], back[moves]] = True
            kept[rows[moves], gone[moves]] = False
            error[rows[moves]] = after[moves]
            goes_on[rows] = ~stops & (error[rows].abs() > self.threshold)
        return kept


def _first(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row is lowest, and how low: int64 and float32 (out,)."""
    low, at = cost.min(1)
    return at, low
