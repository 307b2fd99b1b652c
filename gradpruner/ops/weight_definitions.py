"""The `gradpruner::*` ops that prune single weights, made like those in `definitions`.

The importance of entry (i, j) is abs(weight[i, j]) times a factor. It is computed in float32, and every operation is
rounded. The factor depends on what is given:

    norms and grads: norms[j] + alpha * grads[i, j]
    norms alone:     norms[j]
    grads alone:     alpha * grads[i, j]
    neither:         1

An importance that is not above zero, a NaN too, counts as zero. Of equal entries the one with the lower index is kept.

A mask is uint8 (out, ceil(in / 8)). Entry (i, j) is kept where bit j % 8 of byte (i, j // 8) is set. Bits past the
last column are not set.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradpruner.ops.backends import backend_for
from gradpruner.ops.checks import FLOATS, need, need_dtype, need_same_device, need_shape, need_tokens
from gradpruner.ops.row_major import read_only, updated


def _check_importance(weight: Tensor, norms: Tensor | None, grads: Tensor | None) -> None:
    need_dtype("weight", weight, FLOATS)
    need(weight.ndim == 2, f"weight has shape {tuple(weight.shape)}; expected (out, in)")
    for name, tensor, shape in (("norms", norms, weight.shape[1:]), ("grads", grads, weight.shape)):
        if tensor is not None:
            need_dtype(name, tensor, (torch.float32,))
            need_shape(name, tensor, tuple(shape))
            need_same_device(weight, tensor)


def _new_mask(weight: Tensor) -> Tensor:
    return weight.new_empty((weight.shape[0], (weight.shape[1] + 7) // 8), dtype=torch.uint8)


@torch.library.custom_op("gradpruner::weight_importance", mutates_args=())
def weight_importance(weight: Tensor, norms: Tensor | None, grads: Tensor | None, alpha: float) -> Tensor:
    """Compute the importance of single weights: abs(weight) * (norms + alpha * grads).

    Without `grads` it is abs(weight) * norms, without `norms` abs(weight) * alpha * grads, and abs(weight) without
    both. A result that is not above zero, or NaN, becomes zero.

    Args:
        weight: (out, in), any float dtype.
        norms: one number per input, float32 (in,), as Wanda takes the norms of the inputs. None to leave it out.
        grads: one number per entry, float32 (out, in), as GBLM takes norms of the gradients. None to leave it out.
        alpha: the factor of `grads`.

    Returns:
        The importance, float32 (out, in).

    Raises:
        InvalidArgument: dtypes, shapes or devices do not fit.

    Source: docs/method.md, section 7.
    """
    _check_importance(weight, norms, grads)
    if weight.numel() == 0:
        return weight.new_empty(weight.shape, dtype=torch.float32)
    backend = backend_for(weight.device)
    return backend.weight_importance(read_only(weight), read_only(norms), read_only(grads), alpha)


@weight_importance.register_fake
def _(weight: Tensor, norms: Tensor | None, grads: Tensor | None, alpha: float) -> Tensor:
    return weight.new_empty(weight.shape, dtype=torch.float32)


@torch.library.custom_op("gradpruner::prune_groups_", mutates_args=("weight",))
def prune_groups_(
    weight: Tensor, norms: Tensor | None, grads: Tensor | None, alpha: float, kept: int, group: int
) -> Tensor:
    """Zero all but the `kept` most important of every `group` consecutive inputs of each row.

    The weight is read once and written once. Exactly `kept` entries of each group stay. Of equally important entries,
    those with the lower index stay. `weight_importance` says how the importance is computed.

    Args:
        weight: (out, in), any float dtype. It is changed in place.
        norms: one number per input, float32 (in,), or None.
        grads: one number per entry, float32 (out, in), or None.
        alpha: the factor of `grads`.
        kept: how many entries of each group stay, 0 to `group`.
        group: how many consecutive inputs form a group. It must divide the length of a row. Pass the length itself for
            whole rows, and M for N:M sparsity with kept = N.

    Returns:
        The mask of what stays, uint8 (out, ceil(in / 8)), one bit per entry.

    Raises:
        InvalidArgument: dtypes, shapes or devices do not fit, or `kept` or `group` is out of range.

    Example:
        >>> weight = torch.tensor([[1.0, -4.0, 3.0, 2.0]])
        >>> prune_groups_(weight, None, None, 0.0, kept=2, group=4), weight
        (tensor([[6]], dtype=torch.uint8), tensor([[ 0., -4.,  3.,  0.]]))

    Source: docs/method.md, section 7.
    """
    _check_importance(weight, norms, grads)
    width = weight.shape[1]
    need(
        0 < group <= max(width, 1) and width % group == 0, f"group = {group}; expected a divisor of {width}, the width"
    )
    need(0 <= kept <= group, f"kept = {kept}; accepted are 0 to {group}, the entries of a group")
    if weight.numel() == 0:
        return _new_mask(weight)
    backend = backend_for(weight.device)
    with updated(weight) as target:
        return backend.prune_groups_(target, read_only(norms), read_only(grads), alpha, kept, group)


@prune_groups_.register_fake
def _(weight: Tensor, norms: Tensor | None, grads: Tensor | None, alpha: float, kept: int, group: int) -> Tensor:
    return _new_mask(weight)


@torch.library.custom_op("gradpruner::apply_mask_", mutates_args=("weight",))
def apply_mask_(weight: Tensor, mask: Tensor) -> None:
    """Zero the entries that a mask does not keep. The others keep their bits.

    Args:
        weight: (out, in), any float dtype. It is changed in place.
        mask: uint8 (out, ceil(in / 8)), one bit per entry, as `prune_groups_` returns it.

    Raises:
        InvalidArgument: dtypes, shapes or devices do not fit.

    Source: docs/method.md, section 7.
    """
    need_dtype("weight", weight, FLOATS)
    need(weight.ndim == 2, f"weight has shape {tuple(weight.shape)}; expected (out, in)")
    need_dtype("mask", mask, (torch.uint8,))
    need_shape("mask", mask, (weight.shape[0], (weight.shape[1] + 7) // 8))
    need_same_device(weight, mask)
    if weight.numel() == 0:
        return
    with updated(weight) as target:
        backend_for(weight.device).apply_mask_(target, read_only(mask))


@apply_mask_.register_fake
def _(weight: Tensor, mask: Tensor) -> None:
    return None


@torch.library.custom_op("gradpruner::wgrad_abs_accumulate_", mutates_args=("total",))
def wgrad_abs_accumulate_(total: Tensor, x: Tensor, dy: Tensor) -> None:
    """Add the absolute values of a frozen weight's gradient: total += abs(dy^T x).

    The gradient dy^T x is never stored. If `x` or `dy` holds a NaN or an infinity, `total` stays as it was. A value
    that overflows float32 adds nothing.

    Args:
        total: the sums, float32 (out, in). It is changed in place.
        x: inputs of the linear, (tokens, in), any float dtype.
        dy: gradients of its outputs, (tokens, out), of the dtype of `x`.

    Raises:
        InvalidArgument: dtypes, shapes or devices do not fit.

    Source: docs/method.md, section 7 (GBLM-Pruner with p = 1). `wgrad_square_accumulate_` does the same with squares.
    """
    need_tokens(x, dy)
    need_dtype("total", total, (torch.float32,))
    need_shape("total", total, (dy.shape[1], x.shape[1]))
    need_same_device(x, dy, total)
    if total.numel() == 0:
        return
    with updated(total) as target:
        backend_for(x.device).wgrad_abs_accumulate_(target, read_only(x), read_only(dy))


@wgrad_abs_accumulate_.register_fake
def _(total: Tensor, x: Tensor, dy: Tensor) -> None:
    return None
