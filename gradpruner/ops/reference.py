"""The oracle: every op in plain torch, in float64 where it matters, written to be read.

The functions have the signatures of the ops in `gradpruner.ops`, which explain the arguments. The other backends have
the same functions. Tensors have been checked and made row-major by the ops; those that an op writes to are changed in
place.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gram_norm(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Compute ||b_i a_i||_F^2 of every pair from two r x r Gram matrices.

    Args:
        a, b: as in the op.
    """
    norms = [((bi.double().T @ bi.double()) * (ai.double() @ ai.double().T)).sum() for ai, bi in zip(a, b, strict=True)]
    return torch.stack(norms)


def square_accumulate_(igia: Tensor, grad: Tensor) -> None:
    """Compute igia += grad ** 2.

    Args:
        igia, grad: as in the op.
    """
    igia += grad.to(igia.dtype).square()


def outer_square_accumulate_(igia: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute igia += (b @ a) ** 2.

    Args:
        igia, a, b: as in the op.
    """
    igia += (b.double() @ a.double()).square().to(igia.dtype)


def wgrad_square_accumulate_(igia: Tensor | None, x: Tensor, dy: Tensor, grad: Tensor | None) -> Tensor:
    """Compute g = dy^T x, plus grad where given, and igia += g ** 2 where all is finite.

    Args:
        igia, x, dy, grad: as in the op.
    """
    g = dy.double().T @ x.double()
    if grad is not None:
        grad += g.to(grad.dtype)
        g = grad.double()
    if igia is not None and bool(x.isfinite().all() & dy.isfinite().all()):
        square = g.square().to(igia.dtype)
        igia += torch.where(square.isfinite(), square, 0.0)
    return g.square().sum()


def threshold(igia: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k-th largest positive entry and the flat index of the last tie that is kept.

    Args:
        igia, k: as in the op.
    """
    flat = igia.flatten()
    flat = torch.where(flat > 0, flat, 0.0)  # NaN and negative entries are never kept
    k = min(k, int((flat > 0).sum()))
    if k == 0:
        return igia.new_tensor(float("inf")), torch.full((), -1, dtype=torch.int64, device=igia.device)
    value = flat.sort(descending=True).values[k - 1]
    ties = (flat == value).nonzero().flatten()
    return value.clone(), ties[k - 1 - int((flat > value).sum())].clone()


def factor_importance(a: Tensor, b: Tensor) -> Tensor:
    """Compute F = sum over steps of (b_i @ a_i) ** 2, rounded once to float32.

    Args:
        a: (t, r, in).
        b: (t, out, r).

    Source: docs/method.md, section 1, "Importance of an entry".
    """
    total = torch.zeros(b.shape[1], a.shape[2], dtype=torch.float64, device=a.device)
    for ai, bi in zip(a, b, strict=True):
        total += (bi.double() @ ai.double()).square()
    return total.float()


def factor_threshold(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the `threshold` of the importance that the factors stand for.

    Args:
        a, b, k: as in the op.
    """
    return threshold(factor_importance(a, b), k)


def sign_merge_(
    weight: Tensor,
    donors: list[Tensor],
    igias: list[Tensor],
    values: list[Tensor],
    indices: list[Tensor],
    scales: list[float],
) -> None:
    """Compute weight += sum_k scale_k * mask_k * [sign(donor_k) == sign(weight)] * donor_k.

    Args:
        weight, donors, igias, values, indices, scales: as in the op.
    """
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
    weight.copy_(torch.where(touched, merged.to(weight.dtype), weight))  # other entries keep their bits, NaN too


def factor_sign_merge_(
    weight: Tensor,
    donors: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    values: list[Tensor],
    indices: list[Tensor],
    scales: list[float],
) -> None:
    """Compute `sign_merge_` with each donor's importance given by its factors.

    Args:
        weight, donors, a, b, values, indices, scales: as in the op.
    """
    igias = [factor_importance(ak, bk) for ak, bk in zip(a, b, strict=True)]
    sign_merge_(weight, donors, igias, values, indices, scales)


def weight_importance(weight: Tensor, norms: Tensor | None, grads: Tensor | None, alpha: float) -> Tensor:
    """Compute abs(weight) * (norms + alpha * grads), each operation rounded to float32.

    Args:
        weight, norms, grads, alpha: as in the op.
    """
    importance = weight.float().abs()
    if grads is not None:
        scaled = torch.tensor(alpha, dtype=torch.float32, device=grads.device) * grads
        importance = importance * (scaled if norms is None else norms + scaled)
    elif norms is not None:
        importance = importance * norms
    return torch.where(importance > 0, importance, 0.0)


def prune_groups_(
    weight: Tensor, norms: Tensor | None, grads: Tensor | None, alpha: float, kept: int, group: int
) -> Tensor:
    """Zero all but the `kept` most important entries of each `group`, and return the mask.

    Args:
        weight, norms, grads, alpha, kept, group: as in the op.
    """
    importance = weight_importance(weight, norms, grads, alpha).view(-1, group)
    order = importance.argsort(dim=-1, descending=True, stable=True)  # stable: of equal entries the lower index is kept
    keep = torch.zeros_like(importance, dtype=torch.bool).scatter_(1, order[:, :kept], True).view(weight.shape)
    weight.masked_fill_(~keep, 0.0)
    bits = torch.nn.functional.pad(keep, (0, -weight.shape[1] % 8)).view(weight.shape[0], -1, 8)
    places = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=weight.device)
    return (bits * places).sum(-1, dtype=torch.uint8)


def apply_mask_(weight: Tensor, mask: Tensor) -> None:
    """Zero the entries that the mask does not keep.

    Args:
        weight, mask: as in the op.
    """
    bits = mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
    weight.masked_fill_(bits.flatten(1)[:, : weight.shape[1]] == 0, 0.0)


def wgrad_abs_accumulate_(total: Tensor, x: Tensor, dy: Tensor) -> None:
    """Compute total += abs(dy^T x) unless x or dy is not finite.

    Args:
        total, x, dy: as in the op.
    """
    if bool(x.isfinite().all() & dy.isfinite().all()):
        size = (dy.double().T @ x.double()).abs().to(total.dtype)
        total += torch.where(size.isfinite(), size, 0.0)
