"""sparsegpt: columns from left to right; what a removed weight did is given to those still to come."""

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
from gradpruner.sparsity.statistics import HESSIAN, Seen


@register
@dataclass(frozen=True)
class SparseGpt(Criterion):
    """Optimal brain surgeon, a column at a time: w^2 / [H^-1]_jj decides, the columns to the right make up for it.

    block: columns among which a choice is made at once; for N:M it is M that decides. damping: share of the mean
    diagonal of H that is added to it. Raises InvalidArgument.
    Source: docs/method.md, section 7 (Frantar and Alistarh 2023).
    """

    block: int = 128
    damping: float = 0.01
    name: ClassVar[str] = "sparsegpt"
    needs: ClassVar[frozenset[str]] = frozenset({HESSIAN})

    def __post_init__(self) -> None:
        """Check the options."""
        check_int("block", self.block, 1, "a number of columns")
        if not is_number(self.damping) or not 0 < self.damping < 1:
            raise InvalidArgument(f"damping = {self.damping!r}; accepted is a share above 0 and below 1")

    def prune_(self, weight: Tensor, seen: Seen, pattern: Pattern) -> Tensor:
        """Zero entries and change the others; the Hessian in `seen` is used up."""
        assert seen.hessian is not None
        width = weight.shape[1]
        updated, kept = weight.float(), torch.empty_like(weight, dtype=torch.bool)
        dead = seen.hessian.diagonal() == 0
        updated[:, dead] = 0
        factor = inverse_factor_(seen.hessian, dead, self.damping)
        group = pattern.groups(width)[1] if pattern.is_n_of_m else self.block  # columns that are chosen among at once
        step = max(group, self.block // group * group)
        for start in range(0, width, step):
            stop = min(start + step, width)
            part, inverse = updated[:, start:stop], factor[start:stop, start:stop]
            errors = torch.empty_like(part)
            for first in range(0, stop - start, group):
                last = min(first + group, stop - start)
                chosen = _choose(part[:, first:last], 1 / inverse.diagonal()[first:last], pattern, start + first)
                kept[:, start + first : start + last] = chosen
                for j in range(first, last):
                    alive = kept[:, start + j]
                    errors[:, j] = torch.where(alive, 0.0, part[:, j]) / inverse[j, j]
                    part[:, j:] -= errors[:, j : j + 1] * inverse[j, j:]
                    part[:, j].masked_fill_(~alive, 0.0)
            updated[:, stop:] -= errors @ factor[start:stop, stop:]
        weight.copy_(updated)
        if not bool(weight.isfinite().all()):
            raise InvalidArgument(
                f"{weight.dtype} does not hold what sparsegpt makes of a weight; expected more damping"
            )
        return pack(kept)


def inverse_factor_(hessian: Tensor, dead: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped H, float32 (in, in); H is overwritten.

    dead: inputs that were always zero. Raises InvalidArgument if H cannot be inverted.
    """
    diagonal = hessian.diagonal()
    diagonal[dead] = 1
    diagonal += damping * diagonal.mean()
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        return torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError as error:
        raise InvalidArgument(f"damping is too small to invert the Hessian ({error}); expected a larger one") from error


def _choose(part: Tensor, scale: Tensor, pattern: Pattern, start: int) -> Tensor:
    """Which entries of the columns from `start` on stay: boolean, the shape of `part`; abs(w) / d ranks as its square.

    Of row and matrix so many that the shares of all blocks add up exactly.
    """
    rows, columns = part.shape

    def gone(lines: int) -> int:
        return int(pattern.share * lines * (start + columns)) - int(pattern.share * lines * start)

    if pattern.within == "matrix":
        return largest(ops.weight_importance(part, scale, None, 1.0), rows * columns - gone(rows))
    kept, group = pattern.groups(columns) if pattern.is_n_of_m else (columns - gone(1), columns)
    return unpack(ops.prune_groups_(part.clone(), scale, None, 1.0, kept, group), columns)
