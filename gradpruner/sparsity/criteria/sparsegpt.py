"""Criterion "sparsegpt": zero weights, and let the columns to the right make up for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradpruner import ops
from gradpruner.checkpoint.mask_bits import pack, unpack
from gradpruner.checks import check_int, is_number
from gradpruner.errors import InvalidArgument
from gradpruner.sparsity.criteria.base import Criterion, register
from gradpruner.sparsity.pattern import Pattern, largest
from gradpruner.sparsity.statistics import HESSIAN, LinearStatistics


@register
@dataclass(frozen=True)
class SparseGpt(Criterion):
    """Optimal brain surgeon, one column after the other.

    H = Xᵀ X is the Hessian of the squared error of the linear's output. Columns are visited from left to right. The
    weights with the smallest w² / [H⁻¹]ⱼⱼ are zeroed. The columns to the right of a zeroed weight are changed so that
    the layer's output changes least.

    Args:
        block: number of columns among which a choice is made at once. For N:M it is M columns. Default 128.
        damping: what is added to the diagonal of H, as a share of its mean, above 0 and below 1. Default 0.01.

    Raises:
        InvalidArgument: an option is not one of these values.

    Source: docs/method.md, section 7 (Frantar and Alistarh 2023, SparseGPT).
    """

    block: int = 128
    damping: float = 0.01
    name: ClassVar[str] = "sparsegpt"
    needs: ClassVar[frozenset[str]] = frozenset({HESSIAN})

    def __post_init__(self) -> None:
        """Check the options before time is spent."""
        check_int("block", self.block, 1, "a number of columns")
        if not is_number(self.damping) or not 0 < self.damping < 1:
            raise InvalidArgument(f"damping = {self.damping!r}; accepted is a share above 0 and below 1")

    def prune_(self, weight: Tensor, statistics: LinearStatistics, pattern: Pattern) -> Tensor:
        """Zero entries and change the others.

        Args:
            weight: (out, in), changed in place.
            statistics: the Hessian of the inputs. It is overwritten.
            pattern: how many entries are zeroed, and among which the choice is made.

        Returns:
            The mask of the entries that stay.

        Raises:
            InvalidArgument: the Hessian cannot be inverted, or the dtype of the weight cannot hold the changed values.
        """
        assert statistics.hessian is not None
        width = weight.shape[1]
        updated, kept = weight.float(), torch.empty_like(weight, dtype=torch.bool)
        always_zero = statistics.hessian.diagonal() == 0  # inputs
        updated[:, always_zero] = 0
        factor = inverse_factor_(statistics.hessian, always_zero, self.damping)
        group = pattern.groups(width)[1] if pattern.is_n_of_m else self.block  # columns that are chosen among at once
        step = max(group, self.block // group * group)
        for start in range(0, width, step):
            stop = min(start + step, width)
            columns, inverse = updated[:, start:stop], factor[start:stop, start:stop]
            errors = torch.empty_like(columns)
            for first in range(0, stop - start, group):
                last = min(first + group, stop - start)
                scale = 1 / inverse.diagonal()[first:last]
                kept[:, start + first : start + last] = _choose(columns[:, first:last], scale, pattern, start + first)
                for j in range(first, last):
                    stays = kept[:, start + j]
                    errors[:, j] = torch.where(stays, 0.0, columns[:, j]) / inverse[j, j]
                    columns[:, j:] -= errors[:, j : j + 1] * inverse[j, j:]
                    columns[:, j].masked_fill_(~stays, 0.0)
            updated[:, stop:] -= errors @ factor[start:stop, stop:]
        weight.copy_(updated)
        if not bool(weight.isfinite().all()):
            raise InvalidArgument(
                f"{weight.dtype} does not hold the values that sparsegpt computes for a weight; expected more damping"
            )
        return pack(kept)


def inverse_factor_(hessian: Tensor, always_zero: Tensor, damping: float) -> Tensor:
    """Compute the upper Cholesky factor of the inverse of the damped Hessian.

    Args:
        hessian: float32 (in, in). It is overwritten.
        always_zero: the inputs that were always zero, boolean (in,). Their diagonal becomes 1.
        damping: what is added to the diagonal, as a share of its mean.

    Returns:
        float32 (in, in).

    Raises:
        InvalidArgument: the damped Hessian cannot be inverted.
    """
    diagonal = hessian.diagonal()
    diagonal[always_zero] = 1
    diagonal += damping * diagonal.mean()
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        return torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError as error:
        raise InvalidArgument(f"damping is too small to invert the Hessian ({error}); expected a larger one") from error


def _choose(columns: Tensor, scale: Tensor, pattern: Pattern, start: int) -> Tensor:
    """Choose the entries of some columns that stay: boolean, the shape of `columns`.

    Args:
        columns: float32 (out, columns), from column `start` of the weight on.
        scale: 1 / d of each column, where d² is [H⁻¹]ⱼⱼ. |w| / d ranks entries as w² / d² does.
        pattern: for "row" and "matrix", each block gets as many as make the shares of all blocks add up exactly.
        start: index of the first column.
    """
    rows, width = columns.shape

    def zeroed(lines: int) -> int:
        """How many entries of these columns are zeroed, in so many rows together."""
        return int(pattern.share * lines * (start + width)) - int(pattern.share * lines * start)

    if pattern.within == "matrix":
        return largest(ops.weight_importance(columns, scale, None, 1.0), rows * width - zeroed(rows))
    kept, group = pattern.groups(width) if pattern.is_n_of_m else (width - zeroed(1), width)
    return unpack(ops.prune_groups_(columns.clone(), scale, None, 1.0, kept, group), width)
