"""What the methods' authors do, in plain torch: dense squares, full sorts, dense masks.

Source: docs/method.md, C and section 7.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.ops.base import Implementation, Tensors

LARGEST_STEP = 1 << 36  # entries times rank, on a CPU


class Released(Implementation):
    """Each gradient is built densely, squared and added; a mask comes from a full sort."""

    name, kind = "released", "released"

    def gram_norm(self, a: Tensors, b: Tensors) -> Tensor:
        """The squared norm of every product, built densely."""
        work = sum(ai.shape[1] * bi.shape[0] for ai, bi in zip(a, b, strict=True)) * a[0].shape[0]
        if self.device.type == "cpu" and work > LARGEST_STEP:
            return NotImplemented  # minutes a call, and no news: it takes longer still than at a lower rank
        return torch.stack([((bi @ ai) ** 2).sum() for ai, bi in zip(a, b, strict=True)])

    def square_accumulate_(self, igia: Tensor, grad: Tensor) -> None:
        """A square, then a sum; in float32, since bfloat16 squares would be another answer."""
        igia += grad.float() ** 2

    def outer_square_accumulate_(self, igia: Tensor, a: Tensor, b: Tensor) -> None:
        """A product, a square, a sum."""
        igia += (b @ a) ** 2

    def wgrad_square_accumulate_(self, igia: Tensor, x: Tensor, dy: Tensor, grad: None) -> Tensor:
        """The whole weight gradient, as training the weight would hold it, squared."""
        square = (dy.float().T @ x.float()) ** 2
        igia += square
        return square.sum()

    def threshold(self, igia: Tensor, k: int) -> Tensor:
        """A float mask."""
        mask = torch.zeros(igia.numel(), device=igia.device)
        mask[torch.argsort(igia.flatten(), descending=True)[:k]] = 1.0
        return mask.view(igia.shape)

    def sign_merge_(self, weight: Tensor, donors: Tensors, igias: Tensors, values: Tensors, *_: Any) -> None:
        """By float masks; each comes from a comparison here, less work than the sort it came from."""
        self.merge(weight, donors, [(f > v).float() for f, v in zip(igias, values, strict=True)])

    def factor_merge(self, weight: Tensor, donor: Tensor, a: Tensor, b: Tensor, k: int) -> None:
        """F of all steps, the mask by argsort, the merge."""
        self.merge(weight, [donor], [self.threshold(self.importance(a, b), k)])

    def importance(self, a: Tensor, b: Tensor) -> Tensor:
        """F float32 (out, in) from a (t, r, in) and b (t, out, r) (source: P eq. 2 and 3, C)."""
        igia = torch.zeros(b.shape[1], a.shape[2], device=a.device)
        for ai, bi in zip(a, b, strict=True):
            igia += (bi.float() @ ai.float()) ** 2
        return igia

    def merge(self, weight: Tensor, donors: Tensors, masks: Tensors) -> None:
        """weight += sum of mask * [sign equal] * donor, in float32, stored once (source: C)."""
        merged = weight.float()
        for donor, mask in zip(donors, masks, strict=True):
            agree = (torch.sign(donor) == torch.sign(weight)).float()
            merged = merged + mask * agree * donor.float()
        weight.copy_(merged)

    def weight_importance(self, weight: Tensor, norms: Tensor, grads: Tensor | None, alpha: float) -> Tensor:
        """One product of the sizes and the norms, one of the sizes and the gradients."""
        size = weight.float().abs()
        return size * norms if grads is None else size * norms + alpha * (size * grads)

    def prune_groups_(self, weight: Tensor, norms: Tensor, grads: None, alpha: float, kept: int, group: int) -> Tensor:
        """Whole rows by a stable sort; N:M by topk, a group of columns at a time (Wanda)."""
        metric = self.weight_importance(weight, norms, grads, alpha)
        mask = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
        if group == weight.shape[1]:
            mask.scatter_(1, metric.sort(dim=-1, stable=True)[1][:, : group - kept], True)
        else:
            for first in range(0, weight.shape[1], group):
                least = metric[:, first : first + group].topk(group - kept, dim=1, largest=False)[1]
                mask.scatter_(1, first + least, True)
        weight[mask] = 0
        return ~mask

    def apply_mask_(self, weight: Tensor, mask: Tensor) -> None:
        """The mask unpacked, and what it does not keep chosen by it."""
        bits = mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
        weight[bits.flatten(1)[:, : weight.shape[1]] == 0] = 0

    def wgrad_abs_accumulate_(self, total: Tensor, x: Tensor, dy: Tensor) -> None:
        """The whole weight gradient, its absolute value, a sum (GBLM-Pruner)."""
        total += (dy.float().T @ x.float()).abs()
