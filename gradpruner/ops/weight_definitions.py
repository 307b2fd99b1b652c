"""The ops that prune single weights: schema, argument checks, fake implementation, as in `definitions`.

Importance of entry (i, j): abs(W[i, j]) times a factor, in float32, every operation rounded:

    norms and grads: norms[j] + alpha * grads[i, j]     norms alone: norms[j]
    grads alone:     alpha * grads[i, j]                neither:     1

What is not above zero, a NaN too, counts as zero. Of equals the lower index is kept. A mask is uint8
(out, ceil(in / 8)): entry (i, j) is kept where bit j % 8 of byte (i, j // 8) is set; bits past the last column are not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradpruner.ops.backends import backend_for
from gradpruner.ops.checks import FLOATS, need, need_dtype, need_same_device, need_shape, need_tokens


def _check_importance(weight: Tensor, norms: Tensor | None, grads: Tensor | None) -> None:
    need_dtype("weight", weight, FLOATS)
    need(weight.ndim == 2, f"weight has shape {tuple(weight.shape)}; expected (out, in)")
    for name, tensor, shape in (("norms", norms, weight.shape[1:]), ("grads", grads, weight.shape)):
        if tensor is not None:
            need_dtype(name, tensor, (torch.float32,))
            need_shape(name, tensor, tuple(shape))
            need_same_device(weight, tensor)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _new_mask(weight: Tensor) -> Tensor:
    return weight.new_empty((weight.shape[0], (weight.shape[1] + 7) // 8), dtype=torch.uint8)


@torch.library.custom_op("gradpruner::weight_importance", mutates_args=())
def weight_importance(weight: Tensor, norms: Tensor | None, grads: Tensor | None, alpha: float) -> Tensor:
    """abs(weight) * (norms + alpha * grads) in one pass, float32 (out, in).

    weight: (out, in), any float dtype. norms: float32 (in,) or None. grads: float32 (out, in) or None.
    Raises InvalidArgument. Source: docs/method.md, section 7.
    """
    _check_importance(weight, norms, grads)
    if weight.numel() == 0:
        return weight.new_empty(weight.shape, dtype=torch.float32)
    backend = backend_for(weight.device)
    return backend.weight_importance(weight.contiguous(), _contiguous(norms), _contiguous(grads), alpha)


@weight_importance.register_fake
def _(weight: Tensor, norms: Tensor | None, grads: Tensor | None, alpha: float) -> Tensor:
    return weight.new_empty(weight.shape, dtype=torch.float32)


@torch.library.custom_op("gradpruner::prune_groups_", mutates_args=("weight",))
def prune_groups_(
    weight: Tensor, norms: Tensor | None, grads: Tensor | None, alpha: float, kept: int, group: int
) -> Tensor:
    """Zero all but the `kept` most important of every `group` consecutive inputs of each row; returns the mask.

    weight: (out, in), any float dtype, read once and written once. norms: float32 (in,) or None. grads: float32
    (out, in) or None. group: a divisor of in: in itself for whole rows, M for N:M with kept = N. Exactly `kept` of
    each group stay. Raises InvalidArgument. Source: docs/method.md, section 7.
    """
    _check_importance(weight, norms, grads)
    width = weight.shape[1]
    need(
        0 < group <= max(width, 1) and width % group == 0, f"group = {group}; expected a divisor of {width}, the width"
    )
    need(0 <= kept <= group, f"kept = {kept}; accepted are 0 to {group}, the entries of a group")
    if weight.numel() == 0:
        return _new_mask(weight)
    target = weight.contiguous()
    mask = backend_for(weight.device).prune_groups_(target, _contiguous(norms), _contiguous(grads), alpha, kept, group)
    if target is not weight:
        weight.copy_(target)
    return mask


@prune_groups_.register_fake
def _(weight: Tensor, norms: Tensor | None, grads: Tensor | None, alpha: float, kept: int, group: int) -> Tensor:
    return _new_mask(weight)


@torch.library.custom_op("gradpruner::apply_mask_", mutates_args=("weight",))
def apply_mask_(weight: Tensor, mask: Tensor) -> None:
    """Zero the entries that the mask does not keep; the others keep their bits.

    weight: (out, in), any float dtype. mask: uint8 (out, ceil(in / 8)). Raises InvalidArgument. Source: D.
    """
    need_dtype("weight", weight, FLOATS)
    need(weight.ndim == 2, f"weight has shape {tuple(weight.shape)}; expected (out, in)")
    need_dtype("mask", mask, (torch.uint8,))
    need_shape("mask", mask, (weight.shape[0], (weight.shape[1] + 7) // 8))
    need_same_device(weight, mask)
    if weight.numel() == 0:
        return
    target = weight.contiguous()
    backend_for(weight.device).apply_mask_(target, mask.contiguous())
    if target is not weight:
        weight.copy_(target)


@apply_mask_.register_fake
def _(weight: Tensor, mask: Tensor) -> None:
    return None


@torch.library.custom_op("gradpruner::wgrad_abs_accumulate_", mutates_args=("total",))
def wgrad_abs_accumulate_(total: Tensor, x: Tensor, dy: Tensor) -> None:
    """total += abs(dy^T x), without building dy^T x: the twin of `wgrad_square_accumulate_` for a frozen weight.

    x: (tokens, in), dy: (tokens, out), one float dtype; total: float32 (out, in). If x or dy holds a NaN or Inf,
    total is left as it was; what overflows float32 adds nothing. Raises InvalidArgument. Source: docs/method.md,
    section 7 (GBLM-Pruner, p = 1).
    """
    need_tokens(x, dy)
    need_dtype("total", total, (torch.float32,))
    need_shape("total", total, (dy.shape[1], x.shape[1]))
    need_same_device(x, dy, total)
    if total.numel() == 0:
        return
    target = total.contiguous()
    backend_for(x.device).wgrad_abs_accumulate_(target, x.contiguous(), dy.contiguous())
    if target is not total:
        total.copy_(target)


@wgrad_abs_accumulate_.register_fake
def _(total: Tensor, x: Tensor, dy: Tensor) -> None:
    return None
