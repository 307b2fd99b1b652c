"""The `gradpruner::*` ops: schema, argument checks, fake implementation. Backends fill them in.

Shapes and dtypes are checked here, once, so that no backend has to. Every op works on logically row-major
tensors: a non-contiguous input is copied, a non-contiguous output is computed in a copy and written back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradpruner.errors import InvalidArgument
from gradpruner.ops.backends import backend_for
from gradpruner.ops.checks import (
    FLOATS,
    need,
    need_count,
    need_dtype,
    need_factors,
    need_same_device,
    need_shape,
    need_tokens,
)

# Their kernels read a table of addresses that the host copies from pinned memory and then lets go: the replay of a
# captured CUDA graph would copy again, from memory that is another's by then.
UNCAPTURED = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("gradpruner::gram_norm", mutates_args=(), tags=UNCAPTURED)
def gram_norm(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Squared Frobenius norm of b_i @ a_i for every pair, without building the product.

    a: n tensors (r_i, in_i); b: n tensors (out_i, r_i); any float dtype, one device. Returns float64 (n,).
    Raises InvalidArgument if lengths, shapes or devices do not fit. Source: D.
    """
    need(len(a) == len(b), f"a has {len(a)} tensors and b has {len(b)}; expected as many")
    if not a:
        return torch.zeros(0, dtype=torch.float64)
    device = a[0].device
    for i, (ai, bi) in enumerate(zip(a, b, strict=True)):  # hundreds of pairs a step: a message only where it is needed
        if ai.ndim != 2 or bi.ndim != 2 or ai.size(0) != bi.size(1):
            shapes = f"{tuple(ai.shape)} and {tuple(bi.shape)}"
            raise InvalidArgument(f"pair {i} has shapes {shapes}; expected (r, in) and (out, r)")
        if ai.dtype not in FLOATS or bi.dtype not in FLOATS:
            need_dtype(f"a[{i}]", ai, FLOATS)
            need_dtype(f"b[{i}]", bi, FLOATS)
        if ai.device != device or bi.device != device:
            need_same_device(a[0], ai, bi)
    return backend_for(device).gram_norm([t.contiguous() for t in a], [t.contiguous() for t in b])


@gram_norm.register_fake
def _(a: list[Tensor], b: list[Tensor]) -> Tensor:
    if not a:
        return torch.zeros(0, dtype=torch.float64)
    return a[0].new_empty((len(a),), dtype=torch.float64)


@torch.library.custom_op("gradpruner::square_accumulate_", mutates_args=("igia",))
def square_accumulate_(igia: Tensor, grad: Tensor) -> None:
    """igia += grad ** 2 in one pass, no temporary.

    igia: float32, any shape; grad: the same shape, any float dtype, squared in float32.
    Raises InvalidArgument. Source: P eq. 3.
    """
    need_dtype("igia", igia, (torch.float32,))
    need_dtype("grad", grad, FLOATS)
    need_shape("grad", grad, tuple(igia.shape))
    need_same_device(igia, grad)
    if igia.numel() == 0:
        return
    target = igia.contiguous()
    backend_for(igia.device).square_accumulate_(target, grad.contiguous())
    if target is not igia:
        igia.copy_(target)


@square_accumulate_.register_fake
def _(igia: Tensor, grad: Tensor) -> None:
    return None


@torch.library.custom_op("gradpruner::outer_square_accumulate_", mutates_args=("igia",))
def outer_square_accumulate_(igia: Tensor, a: Tensor, b: Tensor) -> None:
    """igia += (b @ a) ** 2, without building b @ a.

    igia: float32 (out, in); a: (r, in), b: (out, r), both float32 or both bfloat16; products and sums keep
    float32 accuracy. Raises InvalidArgument. Source: P eq. 2 and 3.
    """
    need_dtype("igia", igia, (torch.float32,))
    need_factors(a.unsqueeze(0), b.unsqueeze(0))
    need_shape("igia", igia, (b.shape[0], a.shape[1]))
    need_same_device(igia, a)
    if igia.numel() == 0:
        return
    target = igia.contiguous()
    backend_for(igia.device).outer_square_accumulate_(target, a.contiguous(), b.contiguous())
    if target is not igia:
        igia.copy_(target)


@outer_square_accumulate_.register_fake
def _(igia: Tensor, a: Tensor, b: Tensor) -> None:
    return None


@torch.library.custom_op("gradpruner::wgrad_square_accumulate_", mutates_args=("igia", "grad"))
def wgrad_square_accumulate_(igia: Tensor | None, x: Tensor, dy: Tensor, grad: Tensor | None) -> Tensor:
    """The fused weight gradient: square g = dy^T x where it is computed, never store it for a frozen weight.

    x: (tokens, in), dy: (tokens, out), one float dtype. igia: float32 (out, in) or None, gets g ** 2 added.
    grad: (out, in) in any float dtype or None; where given the weight trains: dy^T x is added into it and
    the squares are those of the sum, as stored. Returns sum(g ** 2), float64 ().

    If x or dy holds a NaN or Inf, igia is left as it was and the returned sum is not finite, which is how the
    caller knows; grad receives what torch would put there. A square that overflows float32 adds nothing to igia.
    Raises InvalidArgument. Source: D (estimator `exact`).
    """
    need_tokens(x, dy)
    need_same_device(x, dy)
    shape = (dy.shape[1], x.shape[1])
    if igia is not None:
        need_dtype("igia", igia, (torch.float32,))
        need_shape("igia", igia, shape)
        need_same_device(x, igia)
    if grad is not None:
        need_dtype("grad", grad, FLOATS)
        need_shape("grad", grad, shape)
        need_same_device(x, grad)
    if shape[0] * shape[1] == 0:
        return x.new_zeros((), dtype=torch.float64)
    igia_target = None if igia is None else igia.contiguous()
    grad_target = None if grad is None else grad.contiguous()
    total = backend_for(x.device).wgrad_square_accumulate_(igia_target, x.contiguous(), dy.contiguous(), grad_target)
    if igia is not None and igia_target is not None and igia_target is not igia:
        igia.copy_(igia_target)
    if grad is not None and grad_target is not None and grad_target is not grad:
        grad.copy_(grad_target)
    return total


@wgrad_square_accumulate_.register_fake
def _(igia: Tensor | None, x: Tensor, dy: Tensor, grad: Tensor | None) -> Tensor:
    return x.new_empty((), dtype=torch.float64)


@torch.library.custom_op("gradpruner::threshold", mutates_args=())
def threshold(igia: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The exact boundary of the k largest entries: entry j is kept if F_j > value, or F_j == value and j <= index.

    igia: float32, any shape. Ties: lower flat index first. Entries that are zero, negative or NaN are never
    kept; with fewer than k positive entries all of them are. Returns value float32 () and index int64 (),
    (inf, -1) where nothing is kept. Stays on the device. Raises InvalidArgument.
    Source: C, D (docs/method.md, section 3).
    """
    need_dtype("igia", igia, (torch.float32,))
    need(0 <= k <= igia.numel(), f"k = {k}; accepted are 0 to {igia.numel()}, the number of entries")
    if k == 0:
        return _nothing_kept(igia)
    return backend_for(igia.device).threshold(igia.contiguous(), k)


@threshold.register_fake
def _(igia: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return igia.new_empty((), dtype=torch.float32), igia.new_empty((), dtype=torch.int64)


@torch.library.custom_op("gradpruner::factor_threshold", mutates_args=())
def factor_threshold(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`threshold` of F = sum over steps of (b_i @ a_i) ** 2, which is never held in memory whole.

    a: (t, r, in), b: (t, out, r), both float32 or both bfloat16. Returns as `threshold` does; the pair is exact
    for F as this backend computes it. Raises InvalidArgument. Source: P eq. 3, D (docs/method.md, section 3).
    """
    need_factors(a, b)
    entries = b.shape[1] * a.shape[2]
    need(0 <= k <= entries, f"k = {k}; accepted are 0 to {entries}, the number of entries")
    if k == 0 or a.shape[0] == 0 or a.shape[1] == 0:
        return _nothing_kept(a)
    return backend_for(a.device).factor_threshold(a.contiguous(), b.contiguous(), k)


@factor_threshold.register_fake
def _(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return a.new_empty((), dtype=torch.float32), a.new_empty((), dtype=torch.int64)


def _nothing_kept(like: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.full((), float("inf"), dtype=torch.float32, device=like.device),
        torch.full((), -1, dtype=torch.int64, device=like.device),
    )


def _check_merge(
    weight: Tensor, donors: list[Tensor], values: list[Tensor], indices: list[Tensor], scales: list[float]
) -> None:
    need_dtype("weight", weight, FLOATS)
    need_count("values", values, len(donors))
    need_count("indices", indices, len(donors))
    need(len(scales) == len(donors), f"scales has {len(scales)} entries; expected {len(donors)}")
    for i, donor in enumerate(donors):
        need_dtype(f"donors[{i}]", donor, (weight.dtype,))
        need_shape(f"donors[{i}]", donor, tuple(weight.shape))
        need_dtype(f"values[{i}]", values[i], (torch.float32,))
        need_dtype(f"indices[{i}]", indices[i], (torch.int64,))
        need_same_device(weight, donor, values[i], indices[i])


@torch.library.custom_op("gradpruner::sign_merge_", mutates_args=("weight",), tags=UNCAPTURED)
def sign_merge_(
    weight: Tensor,
    donors: list[Tensor],
    igias: list[Tensor],
    values: list[Tensor],
    indices: list[Tensor],
    scales: list[float],
) -> None:
    """weight += sum_k scale_k mask_k [sign(donor_k) = sign(weight)] donor_k, all donors in one pass.

    weight and donors: one shape and float dtype. igias: float32, the same shape; values, indices: `threshold`'s
    answers. Signs are tested against the original weight; a zero or NaN matches nothing. Accumulates in
    float32 (float64 for float64 weights), donors in the order given, stores once, rounding to nearest even.
    Raises InvalidArgument. Source: C, P (docs/method.md, section 3).
    """
    _check_merge(weight, donors, values, indices, scales)
    need_count("igias", igias, len(donors))
    for i, igia in enumerate(igias):
        need_dtype(f"igias[{i}]", igia, (torch.float32,))
        need_shape(f"igias[{i}]", igia, tuple(weight.shape))
        need_same_device(weight, igia)
    if weight.numel() == 0 or not donors:
        return
    target = weight.contiguous()
    backend_for(weight.device).sign_merge_(
        target, [d.contiguous() for d in donors], [f.contiguous() for f in igias], values, indices, scales
    )
    if target is not weight:
        weight.copy_(target)


@sign_merge_.register_fake
def _(
    weight: Tensor,
    donors: list[Tensor],
    igias: list[Tensor],
    values: list[Tensor],
    indices: list[Tensor],
    scales: list[float],
) -> None:
    return None


@torch.library.custom_op("gradpruner::factor_sign_merge_", mutates_args=("weight",), tags=UNCAPTURED)
def factor_sign_merge_(
    weight: Tensor,
    donors: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    values: list[Tensor],
    indices: list[Tensor],
    scales: list[float],
) -> None:
    """`sign_merge_` with each donor's importance rebuilt tile by tile from its factors, bit for bit as
    `factor_threshold` rebuilt it.

    weight, donors: (out, in), one float dtype. a[k]: (t, r, in), b[k]: (t, out, r). Raises InvalidArgument.
    Source: C, P, D (docs/method.md, section 3).
    """
    _check_merge(weight, donors, values, indices, scales)
    need_count("a", a, len(donors))
    need_count("b", b, len(donors))
    need(weight.ndim == 2, f"weight has shape {tuple(weight.shape)}; expected (out, in)")
    for i, (ai, bi) in enumerate(zip(a, b, strict=True)):
        need_factors(ai, bi)
        need(
            (bi.shape[1], ai.shape[2]) == tuple(weight.shape),
            f"factors {i} make a {(bi.shape[1], ai.shape[2])} matrix; expected {tuple(weight.shape)}",
        )
        need_same_device(weight, ai)
    if weight.numel() == 0 or not donors:
        return
    target = weight.contiguous()
    backend_for(weight.device).factor_sign_merge_(
        target,
        [d.contiguous() for d in donors],
        [t.contiguous() for t in a],
        [t.contiguous() for t in b],
        values,
        indices,
        scales,
    )
    if target is not weight:
        weight.copy_(target)


@factor_sign_merge_.register_fake
def _(
    weight: Tensor,
    donors: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    values: list[Tensor],
    indices: list[Tensor],
    scales: list[float],
) -> None:
    return None
