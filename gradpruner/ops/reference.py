"""The oracle: every op in plain torch, float64 where it matters, written to be read (docs/method.md, D).

The other backends have the same functions with the same signatures. Inputs have been checked
and made contiguous by `gradpruner.ops.definitions`; tensors that are written keep their identity.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gram_norm(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """||b_i a_i||_F^2 of every pair, float64 (n,), from two r x r Gram matrices (source: D)."""
    norms = [((bi.double().T @ bi.double()) * (ai.double() @ ai.double().T)).sum() for ai, bi in zip(a, b, strict=True)]
    return torch.stack(norms)


def square_accumulate_(igia: Tensor, grad: Tensor) -> None:
    """igia += grad ** 2 (source: P eq. 3)."""
    igia += grad.to(igia.dtype).square()


def outer_square_accumulate_(igia: Tensor, a: Tensor, b: Tensor) -> None:
    """igia += (b @ a) ** 2 (source: P eq. 2 and 3)."""
    igia += (b.double() @ a.double()).square().to(igia.dtype)


def wgrad_square_accumulate_(igia: Tensor | None, x: Tensor, dy: Tensor, grad: Tensor | None) -> Tensor:
    """g = dy^T x, plus grad where given; igia += g ** 2 unless x, dy or g is not finite (source: D)."""
    g = dy.double().T @ x.double()
    if grad is not None:
        grad += g.to(grad.dtype)
        g = grad.double()
    if igia is not None and bool(x.isfinite().all() & dy.isfinite().all()):
        square = g.square().to(igia.dtype)
        igia += torch.where(square.isfinite(), square, 0.0)
    return g.square().sum()


def threshold(igia: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k-th largest positive entry and the flat index of the last tie that is kept (docs/method.md, section 3)."""
    flat = igia.flatten()
    flat = torch.where(flat > 0, flat, 0.0)  # NaN and negative entries are never kept
    k = min(k, int((flat > 0).sum()))
    if k == 0:
        return igia.new_tensor(float("inf")), torch.full((), -1, dtype=torch.int64, device=igia.device)
    value = flat.sort(descending=True).values[k - 1]
    ties = (flat == value).nonzero().flatten()
    return value.clone(), ties[k - 1 - int((flat > value).sum())].clone()


def factor_importance(a: Tensor, b: Tensor) -> Tensor:
    """F = sum over steps of (b_i @ a_i) ** 2, rounded once to float32 (source: P eq. 3)."""
    total = torch.zeros(b.shape[1], a.shape[2], dtype=torch.float64, device=a.device)
    for ai, bi in zip(a, b, strict=True):
        total += (bi.double() @ ai.double()).square()
    return total.float()


def factor_threshold(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`threshold` of the importance that the factors stand for (docs/method.md, section 3)."""
    return threshold(factor_importance(a, b), k)


def sign_merge_(
    weight: Tensor,
    donors: list[Tensor],
    igias: list[Tensor],
    values: list[Tensor],
    indices: list[Tensor],
    scales: list[float],
) -> None:
    """weight += sum_k scale_k * mask_k * [sign(donor_k) == sign(weight)] * donor_k (docs/method.md, section 3)."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    original = weight.to(wide)
    flat_index = torch.arange(weight.numel(), device=weight.device).view(weight.shape)
    merged = original.clone()
    touched = torch.zeros_like(weight, dtype=torch.bool)
    for donor, igia, value, index, scale in zip(donors, igias, values, indices, scales, strict=True):
        v = donor.to(wide)
        keep = (igia > value) | ((igia == value) & (flat_index <= index))
        agree = ((v > 0) & (original > 0)) | ((v < 0) & (original < 0))
        added = keep & (igia > 0) & agree
        merged = torch.where(added, merged + scale * v, merged)
        touched |= added
    weight.copy_(torch.where(touched, merged.to(weight.dtype), weight))  # the others keep their bits, NaN too


def factor_sign_merge_(
    weight: Tensor,
    donors: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    values: list[Tensor],
    indices: list[Tensor],
    scales: list[float],
) -> None:
    """`sign_merge_` with each donor's importance given by its factors (docs/method.md, section 3)."""
    igias = [factor_importance(ak, bk) for ak, bk in zip(a, b, strict=True)]
    sign_merge_(weight, donors, igias, values, indices, scales)


def weight_importance(weight: Tensor, norms: Tensor | None, grads: Tensor | None, alpha: float) -> Tensor:
    """abs(weight) * (norms + alpha * grads), each operation rounded to float32 (docs/method.md, section 7)."""
    found = weight.float().abs()
    if grads is not None:
        scaled = torch.tensor(alpha, dtype=torch.float32, device=grads.device) * grads
        found = found * (scaled if norms is None else norms + scaled)
    elif norms is not None:
        found = found * norms
    return torch.where(found > 0, found, 0.0)


def prune_groups_(
    weight: Tensor, norms: Tensor | None, grads: Tensor | None, alpha: float, kept: int, group: int
) -> Tensor:
    """Zero all but the `kept` most important of each `group`; the mask, 8 a byte (docs/method.md, section 7)."""
    importance = weight_importance(weight, norms, grads, alpha).view(-1, group)
    order = importance.argsort(dim=-1, descending=True, stable=True)  # stable: of equals the lower index is kept
    keep = torch.zeros_like(importance, dtype=torch.bool).scatter_(1, order[:, :kept], True).view(weight.shape)
    weight.masked_fill_(~keep, 0.0)
    bits = torch.nn.functional.pad(keep, (0, -weight.shape[1] % 8)).view(weight.shape[0], -1, 8)
    places = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=weight.device)
    return (bits * places).sum(-1, dtype=torch.uint8)


def apply_mask_(weight: Tensor, mask: Tensor) -> None:
    """Zero what the mask does not keep (docs/method.md, section 7)."""
    bits = mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
    weight.masked_fill_(bits.flatten(1)[:, : weight.shape[1]] == 0, 0.0)


def wgrad_abs_accumulate_(total: Tensor, x: Tensor, dy: Tensor) -> None:
    """total += abs(dy^T x) unless x or dy is not finite (docs/method.md, section 7)."""
    if bool(x.isfinite().all() & dy.isfinite().all()):
        size = (dy.double().T @ x.double()).abs().to(total.dtype)
        total += torch.where(size.isfinite(), size, 0.0)
