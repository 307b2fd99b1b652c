"""The `gradpruner::*` ops of the method: schema, argument checks, fake implementation.

The backends compute them. Shapes and dtypes are checked here, once, so that no backend has to. Every op works on
row-major tensors: it copies an input that lies otherwise, and computes an output that lies otherwise in a copy that
it writes back.
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
from gradpruner.ops.row_major import all_read_only, read_only, updated

# The kernels of these ops read a table of addresses. The host copies it from pinned memory, which it then frees. The
# replay of a captured CUDA graph would copy again, from memory that belongs to something else by then.
UNCAPTURED = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("gradpruner::gram_norm", mutates_args=(), tags=UNCAPTURED)
def gram_norm(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Squared Frobenius norm of b_i @ a_i for every pair, without building the product.

    Args:
        a: n tensors of shape (r_i, in_i), any float dtype, all on one device.
        b: n tensors of shape (out_i, r_i), any float dtype, on the same device.

    Returns:
        The norms, float64 (n,).

    Raises:
        InvalidArgument: lengths, shapes, dtypes or devices do not fit.

    Example:
        >>> gram_norm([torch.ones(2, 3)], [torch.ones(4, 2)])  # a (4, 3) matrix of twos
        tensor([48.], dtype=torch.float64)

    Source: docs/method.md, section 1, "Sums without the matrix".
    """
    need(len(a) == len(b), f"a has {len(a)} tensors and b has {len(b)}; expected as many")
    if not a:
        return torch.zeros(0, dtype=torch.float64)
    device = a[0].device
    # An optimizer step has hundreds of pairs. So messages are built only where they are needed.
    for i, (ai, bi) in enumerate(zip(a, b, strict=True)):
        if ai.ndim != 2 or bi.ndim != 2 or ai.size(0) != bi.size(1):
            shapes = f"{tuple(ai.shape)} and {tuple(bi.shape)}"
            raise InvalidArgument(f"pair {i} has shapes {shapes}; expected (r, in) and (out, r)")
        if ai.dtype not in FLOATS or bi.dtype not in FLOATS:
            need_dtype(f"a[{i}]", ai, FLOATS)
            need_dtype(f"b[{i}]", bi, FLOATS)
        if ai.device != device or bi.device != device:
            need_same_device(a[0], ai, bi)
    return backend_for(device).gram_norm(all_read_only(a), all_read_only(b))


@gram_norm.register_fake
def _(a: list[Tensor], b: list[Tensor]) -> Tensor:
    if not a:
        return torch.zeros(0, dtype=torch.float64)
    return a[0].new_empty((len(a),), dtype=torch.float64)


@torch.library.custom_op("gradpruner::square_accumulate_", mutates_args=("igia",))
def square_accumulate_(igia: Tensor, grad: Tensor) -> None:
    """Add squares into an importance: igia += grad ** 2, in one pass, without a temporary.

    Args:
        igia: the importance, float32, any shape. It is changed in place.
        grad: the gradient, of the same shape, any float dtype. It is squared in float32.

    Raises:
        InvalidArgument: dtypes, shapes or devices do not fit.

    Source: docs/method.md, section 1, "Importance of an entry".
    """
    need_dtype("igia", igia, (torch.float32,))
    need_dtype("grad", grad, FLOATS)
    need_shape("grad", grad, tuple(igia.shape))
    need_same_device(igia, grad)
    if igia.numel() == 0:
        return
    with updated(igia) as target:
        backend_for(igia.device).square_accumulate_(target, read_only(grad))


@square_accumulate_.register_fake
def _(igia: Tensor, grad: Tensor) -> None:
    return None


@torch.library.custom_op("gradpruner::outer_square_accumulate_", mutates_args=("igia",))
def outer_square_accumulate_(igia: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a product's squares into an importance: igia += (b @ a) ** 2.

    The product b @ a is not built. Products and sums keep float32 accuracy.

    Args:
        igia: the importance, float32 (out, in). It is changed in place.
        a: (r, in), float32 or bfloat16.
        b: (out, r), of the dtype of `a`.

    Raises:
        InvalidArgument: dtypes, shapes or devices do not fit.

    Source: docs/method.md, section 1, "The gradient of a weight" and "Importance of an entry".
    """
    need_dtype("igia", igia, (torch.float32,))
    need_factors(a.unsqueeze(0), b.unsqueeze(0))
    need_shape("igia", igia, (b.shape[0], a.shape[1]))
    need_same_device(igia, a)
    if igia.numel() == 0:
        return
    with updated(igia) as target:
        backend_for(igia.device).outer_square_accumulate_(target, read_only(a), read_only(b))


@outer_square_accumulate_.register_fake
def _(igia: Tensor, a: Tensor, b: Tensor) -> None:
    return None


@torch.library.custom_op("gradpruner::wgrad_square_accumulate_", mutates_args=("igia", "grad"))
def wgrad_square_accumulate_(igia: Tensor | None, x: Tensor, dy: Tensor, grad: Tensor | None) -> Tensor:
    """Square the weight gradient g = dy^T x as it is computed: igia += g ** 2.

    The gradient of a frozen weight is never stored. For a weight that trains, pass its gradient as `grad`: dy^T x is
    added to it, and the stored sum is what is squared.

    If `x` or `dy` holds a NaN or an infinity, `igia` stays as it was, and the returned sum is not finite, so that the
    caller can see it. `grad` then receives what torch would put there. A square that overflows float32 adds nothing to
    `igia`.

    Args:
        igia: the importance, float32 (out, in), changed in place. None where only the sum is wanted.
        x: inputs of the linear, (tokens, in), any float dtype.
        dy: gradients of its outputs, (tokens, out), of the dtype of `x`.
        grad: the gradient of a weight that trains, (out, in), any float dtype, changed in place. None for a frozen
            weight.

    Returns:
        sum(g ** 2), float64 ().

    Raises:
        InvalidArgument: dtypes, shapes or devices do not fit.

    Source: docs/method.md, section 1 (the estimator "exact").
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
    with updated(igia) as igia_target, updated(grad) as grad_target:
        return backend_for(x.device).wgrad_square_accumulate_(igia_target, read_only(x), read_only(dy), grad_target)


@wgrad_square_accumulate_.register_fake
def _(igia: Tensor | None, x: Tensor, dy: Tensor, grad: Tensor | None) -> Tensor:
    return x.new_empty((), dtype=torch.float64)


@torch.library.custom_op("gradpruner::threshold", mutates_args=())
def threshold(igia: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the exact boundary of the k largest entries.

    Entry j is kept if igia[j] > value, or if igia[j] == value and j <= index. So of equal entries those with the
    lower flat index are kept. Entries that are zero, negative or NaN are never kept. With fewer than k positive
    entries, all positive ones are kept. On a GPU, the Triton backend copies nothing to the host.

    Args:
        igia: the importance, float32, any shape.
        k: how many entries to keep, 0 to the number of entries.

    Returns:
        The value, float32 (), and the flat index of the last entry that is kept at this value, int64 (). They are
        (inf, -1) where nothing is kept.

    Raises:
        InvalidArgument: `igia` is not float32, or `k` is out of range.

    Example:
        >>> threshold(torch.tensor([3.0, 1.0, 3.0, 3.0]), 2)
        (tensor(3.), tensor(2))

    Source: docs/method.md, section 3, step 1.
    """
    need_dtype("igia", igia, (torch.float32,))
    need(0 <= k <= igia.numel(), f"k = {k}; accepted are 0 to {igia.numel()}, the number of entries")
    if k == 0:
        return _nothing_kept(igia)
    return backend_for(igia.device).threshold(read_only(igia), k)


@threshold.register_fake
def _(igia: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return igia.new_empty((), dtype=torch.float32), igia.new_empty((), dtype=torch.int64)


@torch.library.custom_op("gradpruner::factor_threshold", mutates_args=())
def factor_threshold(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the `threshold` of F = sum over i of (b_i @ a_i) ** 2, without holding F in memory.

    Args:
        a: (t, r, in), float32 or bfloat16: one factor per step.
        b: (t, out, r), of the dtype of `a`.
        k: how many entries to keep, 0 to out * in.

    Returns:
        Value and flat index, as `threshold` gives them. They are exact for F as this backend computes it.

    Raises:
        InvalidArgument: dtypes, shapes or devices do not fit, or `k` is out of range.

    Source: docs/method.md, section 1, "Importance of an entry", and section 3, step 1.
    """
    need_factors(a, b)
    entries = b.shape[1] * a.shape[2]
    need(0 <= k <= entries, f"k = {k}; accepted are 0 to {entries}, the number of entries")
    if k == 0 or a.shape[0] == 0 or a.shape[1] == 0:
        return _nothing_kept(a)
    return backend_for(a.device).factor_threshold(read_only(a), read_only(b), k)


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
    """Merge donors into a weight, where they are important and agree with it in sign.

    One pass computes

        weight += sum over k of scales[k] * mask_k * [sign(donors[k]) == sign(weight)] * donors[k]

    Signs are compared with the original weight. A zero or a NaN agrees with nothing. The sum is taken in float32 (in
    float64 for float64 weights), in the order of the donors. It is rounded once, to nearest even. An entry to which
    nothing is added keeps its bits.

    Entry k of every list belongs to donor k.

    Args:
        weight: the weight, any shape and float dtype. It is changed in place.
        donors: weights of the same shape and dtype.
        igias: the importance of each donor's entries, float32, of the same shape.
        values: the value that `threshold` gave for igias[k], float32 ().
        indices: the index that `threshold` gave for igias[k], int64 ().
        scales: the factor of each donor. The paper's is 1.

    Raises:
        InvalidArgument: lengths, dtypes, shapes or devices do not fit.

    Source: docs/method.md, section 3.
    """
    _check_merge(weight, donors, values, indices, scales)
    need_count("igias", igias, len(donors))
    for i, igia in enumerate(igias):
        need_dtype(f"igias[{i}]", igia, (torch.float32,))
        need_shape(f"igias[{i}]", igia, tuple(weight.shape))
        need_same_device(weight, igia)
    if weight.numel() == 0 or not donors:
        return
    donors, igias = all_read_only(donors), all_read_only(igias)
    with updated(weight) as target:
        backend_for(weight.device).sign_merge_(target, donors, igias, values, indices, scales)


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
    """Merge donors as `sign_merge_` does, with the importance of each given by its factors.

    The importance F_k = sum over i of (b[k]_i @ a[k]_i) ** 2 is rebuilt tile by tile. Each entry has the same bits as
    in `factor_threshold`, so that the boundary fits.

    Entry k of every list belongs to donor k.

    Args:
        weight: the weight, (out, in), any float dtype. It is changed in place.
        donors: weights of the same shape and dtype.
        a: (t, r, in) per donor, float32 or bfloat16. Steps and ranks may differ from donor to donor.
        b: (t, out, r) per donor, of the dtype of a[k].
        values: the value that `factor_threshold` gave for a[k] and b[k], float32 ().
        indices: the index that `factor_threshold` gave for a[k] and b[k], int64 ().
        scales: the factor of each donor. The paper's is 1.

    Raises:
        InvalidArgument: lengths, dtypes, shapes or devices do not fit.

    Source: docs/method.md, section 3.
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
    donors, a, b = all_read_only(donors), all_read_only(a), all_read_only(b)
    with updated(weight) as target:
        backend_for(weight.device).factor_sign_merge_(target, donors, a, b, values, indices, scales)


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
