"""The strongest ways we know in plain torch. The fastest of a row is its "best torch"."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops.base import Implementation, Tensors


def _panels(matrix: Tensor, entries: int | None = None) -> Iterator[slice]:
    """Slices of rows of about `entries` entries; by default those that, with their product in float32, stay in the
    cores' own caches (a GPU wants large ones)."""
    if entries is None:
        entries = (1 << 16) * torch.get_num_threads() if matrix.device.type == "cpu" else 1 << 24
    height = max(1, entries // matrix.shape[1])
    return (slice(first, first + height) for first in range(0, matrix.shape[0], height))


def _importance(a: Tensor, b: Tensor) -> Tensor:
    """F float32 (out, in): all steps of a panel of rows while it is in the cache."""
    igia = torch.zeros(b.shape[1], a.shape[2], device=a.device)
    for panel in _panels(igia):
        target, product = igia[panel], torch.empty_like(igia[panel])
        for ai, bi in zip(a, b[:, panel], strict=True):
            torch.mm(bi, ai, out=product)
            target.addcmul_(product, product)
    return igia


def _kth_value(igia: Tensor, k: int) -> Tensor:
    return igia.flatten().kthvalue(igia.numel() - k + 1).values


def _top_value(igia: Tensor, k: int) -> Tensor:
    """On a GPU many blocks share one long row in topk; kthvalue has one block for it."""
    return igia.flatten().topk(k, sorted=False).values.min()


def _weight_gradient(x: Tensor, dy: Tensor) -> Tensor:
    """dY^T X in float32; from 16-bit x and dy on a GPU by its 16-bit units, which no other backend of mm offers."""
    if x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(dy.T, x, out_dtype=torch.float32)
    return dy.float().T @ x.float()


def _sampled_value(igia: Tensor, k: int) -> Tensor:
    """The k-th largest entry: a sample brackets it, one pass counts, and only the bracket is ordered."""
    flat, size = igia.flatten(), min(igia.numel(), 1 << 16)
    sample = flat[torch.randint(flat.numel(), (size,), device=flat.device)].sort(descending=True).values
    share = k / flat.numel()
    centre, slack = share * size, 5 * math.sqrt(size * share * (1 - share)) + 1
    high, low = sample[max(0, int(centre - slack))], sample[min(size - 1, int(centre + slack))]
    rank = k - int(torch.count_nonzero(flat > high))
    inside = flat[(flat >= low) & (flat <= high)]
    if not 1 <= rank <= inside.numel():  # the sample was unlucky
        return _kth_value(igia, k)
    return _top_value(inside, rank) if inside.device.type == "cuda" else _kth_value(inside, rank)


def _merge(weight: Tensor, donors: Tensors, igias: Tensors, values: Tensors) -> None:
    """All donors of a panel of rows while it is in the cache."""
    for panel in _panels(weight):
        own = weight[panel].float()
        merged = own.clone()
        for donor, igia, value in zip(donors, igias, values, strict=True):
            added = donor[panel].float()
            added.mul_(igia[panel] >= value)
            merged.add_(added.mul_(own * added > 0))
        weight[panel] = merged


def _merge_top(
    weight: Tensor, donor: Tensor, igia: Tensor, k: int, threshold: Any = _sampled_value, merge: Any = _merge
) -> Tensor:
    value = threshold(igia, k)
    merge(weight, [donor], [igia], [value])
    return value


def _unset(mask: Tensor, columns: int) -> Tensor:
    """bool (out, columns): where no bit of a packed mask is set."""
    bits = mask.unsqueeze(-1).bitwise_and(1 << torch.arange(8, dtype=torch.uint8, device=mask.device))
    return bits.flatten(1)[:, :columns] == 0


class InPlaceTorch(Implementation):
    """Eager torch without avoidable temporaries: out=, addcmul_, row panels that stay in the cache, kthvalue."""

    name, kind = "in place", "torch"

    def gram_norm(self, a: Tensors, b: Tensors) -> Tensor:
        """Two Gram matrices a pair."""
        wide = [(ai.double(), bi.double()) for ai, bi in zip(a, b, strict=True)]
        return torch.stack([((bi.T @ bi) * (ai @ ai.T)).sum() for ai, bi in wide])

    def square_accumulate_(self, igia: Tensor, grad: Tensor) -> None:
        """One pass; of another dtype in panels, whose float32 copies stay in the cache."""
        if grad.dtype == igia.dtype:
            igia.addcmul_(grad, grad)
            return
        for panel in _panels(igia):
            wide = grad[panel].float()
            igia[panel].addcmul_(wide, wide)

    def outer_square_accumulate_(self, igia: Tensor, a: Tensor, b: Tensor) -> None:
        """Panel by panel: product, then square and add."""
        for panel in _panels(igia):
            product = b[panel] @ a
            igia[panel].addcmul_(product, product)

    def wgrad_square_accumulate_(self, igia: Tensor, x: Tensor, dy: Tensor, grad: None) -> Tensor:
        """Panels large enough for the product to run at full speed."""
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        x = self._widened(x)
        for panel in _panels(igia, 1 << (20 if self.device.type == "cpu" else 26)):
            product = _weight_gradient(x, dy[:, panel])
            igia[panel].addcmul_(product, product)
            total += product.flatten().dot(product.flatten())
        return total

    def threshold(self, igia: Tensor, k: int) -> Tensor:
        """The value alone."""
        return _kth_value(igia, k)

    def sign_merge_(self, weight: Tensor, donors: Tensors, igias: Tensors, values: Tensors, *_: Any) -> None:
        """Panel by panel, masks never kept."""
        _merge(weight, donors, igias, values)

    def factor_merge(self, weight: Tensor, donor: Tensor, a: Tensor, b: Tensor, k: int) -> Tensor:
        """F in panels, kthvalue, merge in panels."""
        return _merge_top(weight, donor, _importance(a, b), k, _kth_value)

    def weight_importance(self, weight: Tensor, norms: Tensor, grads: Tensor | None, alpha: float) -> Tensor:
        """Into the result, which the factor was computed in."""
        found = torch.empty(weight.shape, device=weight.device)
        for panel in _panels(weight):
            if grads is None:
                torch.mul(weight[panel].float().abs_(), norms, out=found[panel])
            else:
                torch.add(norms, grads[panel], alpha=alpha, out=found[panel]).mul_(weight[panel].float().abs_())
        return found

    def prune_groups_(self, weight: Tensor, norms: Tensor, grads: None, alpha: float, kept: int, group: int) -> Tensor:
        """kthvalue of the groups of a panel, and one comparison; ties at the edge one by one."""
        keep = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
        for panel in _panels(weight):
            metric = weight[panel].float().abs_().mul_(norms).view(-1, group)
            edge = metric.kthvalue(group - kept + 1, dim=1, keepdim=True).values
            kept_here = keep[panel].view(-1, group)
            torch.ge(metric, edge, out=kept_here)
            extra = kept_here.sum(1) - kept
            for row in extra.nonzero().flatten().tolist():  # seldom: several entries at the edge
                ties = (metric[row] == edge[row]).nonzero().flatten()
                kept_here[row, ties[len(ties) - int(extra[row]) :]] = False
            weight[panel].mul_(keep[panel])
        return keep

    def apply_mask_(self, weight: Tensor, mask: Tensor) -> None:
        """A panel of the mask unpacked at a time."""
        for panel in _panels(weight):
            weight[panel].masked_fill_(_unset(mask[panel], weight.shape[1]), 0.0)

    def wgrad_abs_accumulate_(self, total: Tensor, x: Tensor, dy: Tensor) -> None:
        """Panels large enough for the product to run at full speed."""
        x = self._widened(x)
        for panel in _panels(total, 1 << (20 if self.device.type == "cpu" else 26)):
            total[panel].add_(_weight_gradient(x, dy[:, panel]).abs_())

    def _widened(self, x: Tensor) -> Tensor:
        """Once for all panels, where products are of float32."""
        return x.float() if self.device.type == "cpu" else x


class TopkTorch(Implementation):
    """Selection by topk: of the whole, or of all groups at once."""

    name, kind = "topk", "torch"

    def threshold(self, igia: Tensor, k: int) -> Tensor:
        """The value alone."""
        return _top_value(igia, k)

    def prune_groups_(self, weight: Tensor, norms: Tensor, grads: None, alpha: float, kept: int, group: int) -> Tensor:
        """The places of the kept, scattered into a mask."""
        metric = weight.float().abs_().mul_(norms).view(-1, group)
        places = metric.topk(kept, dim=1, sorted=False).indices
        keep = torch.zeros(metric.shape, dtype=torch.bool, device=weight.device).scatter_(1, places, True)
        weight.mul_(keep.view(weight.shape))
        return keep


class SampledTorch(Implementation):
    """As "in place", with the threshold from a bracket that a random sample gives."""

    name, kind = "sampled", "torch"

    def threshold(self, igia: Tensor, k: int) -> Tensor:
        """The value alone."""
        return _sampled_value(igia, k)

    def factor_merge(self, weight: Tensor, donor: Tensor, a: Tensor, b: Tensor, k: int) -> Tensor:
        """F in panels, the bracket, merge in panels."""
        return _merge_top(weight, donor, _importance(a, b), k)


class OneGemmTorch(Implementation):
    """Many small products as few large ones."""

    name, kind = "one GEMM", "torch"

    def gram_norm(self, a: Tensors, b: Tensors) -> Tensor:
        """Pairs of one shape in one batch."""
        groups: dict[tuple[torch.Size, torch.Size], list[int]] = {}
        for i, (ai, bi) in enumerate(zip(a, b, strict=True)):
            groups.setdefault((ai.shape, bi.shape), []).append(i)
        norms = torch.empty(len(a), dtype=torch.float64, device=self.device)
        for members in groups.values():
            left = torch.stack([b[i] for i in members]).double()
            right = torch.stack([a[i] for i in members]).double()
            norms[members] = (torch.bmm(left.mT, left) * torch.bmm(right, right.mT)).sum((1, 2))
        return norms

    def factor_merge(self, weight: Tensor, donor: Tensor, a: Tensor, b: Tensor, k: int) -> Tensor:
        """F as one product of depth t r (r + 1) / 2, of the products of rows of a and of columns of b."""
        rank = a.shape[1]
        if rank > 16:  # (r + 1) / 2 times the work: hopeless
            return NotImplemented
        i, j = torch.triu_indices(rank, rank, device=a.device)
        left = (b[:, :, i] * b[:, :, j]).mul_(torch.where(i == j, 1.0, 2.0))
        right = (a[:, i] * a[:, j]).flatten(0, 1)
        return _merge_top(weight, donor, left.transpose(0, 1).flatten(1) @ right, k)


def _squared(igia: Tensor, grad: Tensor) -> None:
    igia.add_(grad.float().square())


def _outer_squared(igia: Tensor, a: Tensor, b: Tensor) -> None:
    igia.add_((b @ a).square())


def _wgrad_squared(igia: Tensor, x: Tensor, dy: Tensor) -> Tensor:
    square = _weight_gradient(x, dy).square()
    igia.add_(square)
    return square.sum()


def _merged(weight: Tensor, donors: Tensors, igias: Tensors, values: Tensors) -> None:
    own = weight.float()
    merged = own
    for donor, igia, value in zip(donors, igias, values, strict=True):
        v = donor.float()
        merged = torch.where((igia >= value) & (own * v > 0), merged + v, merged)
    weight.copy_(merged)


def _judged(weight: Tensor, norms: Tensor, grads: Tensor | None, alpha: float) -> Tensor:
    return weight.float().abs() * (norms if grads is None else norms + alpha * grads)


def _ranked(weight: Tensor, norms: Tensor, kept: int, group: int) -> Tensor:
    metric = (weight.float().abs() * norms).view(-1, group)
    place = torch.arange(group, device=weight.device)
    other, own = metric.unsqueeze(1), metric.unsqueeze(2)
    ahead = (other > own) | ((other == own) & (place[None, :] < place[:, None]))
    keep = (ahead.sum(2) < kept).view(weight.shape)
    weight.mul_(keep)
    return keep


def _masked(weight: Tensor, mask: Tensor) -> None:
    weight.masked_fill_(_unset(mask, weight.shape[1]), 0.0)


def _wgrad_sizes(total: Tensor, x: Tensor, dy: Tensor) -> None:
    total.add_(_weight_gradient(x, dy).abs())


class CompiledTorch(Implementation):
    """torch.compile of the plain formulas, specialised to the shape; its first call compiles."""

    name, kind = "compiled", "torch"

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        torch.compiler.reset()  # else the shapes of earlier rows count against the limit of recompilations
        mode = "default" if device.type == "cpu" else "max-autotune-no-cudagraphs"
        compiled = partial(torch.compile, dynamic=False, fullgraph=True, mode=mode)
        self.square_accumulate_ = compiled(_squared)
        self.outer_square_accumulate_ = compiled(_outer_squared)
        self._wgrad, self._merge = compiled(_wgrad_squared), compiled(_merged)
        self.weight_importance, self.apply_mask_ = compiled(_judged), compiled(_masked)
        self.wgrad_abs_accumulate_, self._rank = compiled(_wgrad_sizes), compiled(_ranked)

    def wgrad_square_accumulate_(self, igia: Tensor, x: Tensor, dy: Tensor, grad: None) -> Tensor:
        """The square, the sum and the addition fused behind the product."""
        return self._wgrad(igia, x, dy)

    def sign_merge_(self, weight: Tensor, donors: Tensors, igias: Tensors, values: Tensors, *_: Any) -> None:
        """One fused pass."""
        self._merge(weight, donors, igias, values)

    def factor_merge(self, weight: Tensor, donor: Tensor, a: Tensor, b: Tensor, k: int) -> Tensor:
        """F in panels and the bracket, which fusing cannot help; the merge in one fused pass."""
        return _merge_top(weight, donor, _importance(a, b), k, merge=self._merge)

    def prune_groups_(self, weight: Tensor, norms: Tensor, grads: None, alpha: float, kept: int, group: int) -> Tensor:
        """Small groups by comparing all with all, which fuses; a selection does not."""
        return self._rank(weight, norms, kept, group) if group <= 8 else NotImplemented


class ProductAlone(Implementation):
    """dY^T X alone, into memory that is there already: what the squares are added to."""

    name, kind = "dY^T X alone", "floor"

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._out: Tensor | None = None

    def wgrad_square_accumulate_(self, igia: Tensor, x: Tensor, dy: Tensor, grad: None) -> None:
        """In the dtype of x."""
        if self._out is None:
            self._out = torch.empty(igia.shape, dtype=x.dtype, device=x.device)
        torch.mm(dy.T, x, out=self._out)

    def wgrad_abs_accumulate_(self, total: Tensor, x: Tensor, dy: Tensor) -> None:
        """The same."""
        self.wgrad_square_accumulate_(total, x, dy, None)


ALL: tuple[type[Implementation], ...] = (
    InPlaceTorch,
    SampledTorch,
    TopkTorch,
    OneGemmTorch,
    CompiledTorch,
    ProductAlone,
)
