"""The CPU backend: pass addresses and sizes to the C++ extension `gradpruner._cpu`.

The functions have the signatures of the ops in `gradpruner.ops`, which explain the arguments. Every function here
keeps its tensors alive until the call returns.

By default the best instruction set of the machine is used. `GRADPRUNER_CPU_ISA` (portable, avx2, avx512, avx512bf16,
amx) forces one.
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from gradpruner.errors import InvalidArgument

try:
    import gradpruner._cpu as _cpu
except ImportError as error:
    raise ImportError(
        f"the C++ extension is not there ({error}); installing builds it where a C++ compiler and Python.h are found "
        "and GRADPRUNER_NO_EXT is not set"
    ) from error

try:
    ISA: str = _cpu.select_variant(os.environ.get("GRADPRUNER_CPU_ISA", ""))
except ValueError as error:
    raise InvalidArgument(f"GRADPRUNER_CPU_ISA: {error}") from error

_CODES = {
    torch.float32: _cpu.FLOAT32,
    torch.bfloat16: _cpu.BFLOAT16,
    torch.float16: _cpu.FLOAT16,
    torch.float64: _cpu.FLOAT64,
}


# The C++ side sees plain tuples (csrc/module.cpp). Addresses are `Tensor.data_ptr()`, 0 for a tensor that is absent.


class _Array(NamedTuple):
    """A tensor whose dtype is not fixed."""

    address: int
    dtype: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Array:
        return cls(tensor.data_ptr(), _CODES[tensor.dtype])


class _Pair(NamedTuple):
    """The factors of one gradient: a (rank, n_in) and b (n_out, rank)."""

    a: int
    a_dtype: int
    b: int
    b_dtype: int
    rank: int
    n_in: int
    n_out: int

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> _Pair:
        return cls(*_Array.of(a), *_Array.of(b), rank=a.shape[0], n_in=a.shape[1], n_out=b.shape[0])


class _Factors(NamedTuple):
    """The factors of one importance: a (steps, rank, n_in) and b (steps, n_out, rank)."""

    a: int
    b: int
    dtype: int
    steps: int
    rank: int
    n_in: int
    n_out: int

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> _Factors:
        steps, rank, n_in = a.shape
        return cls(a.data_ptr(), b.data_ptr(), _CODES[a.dtype], steps, rank, n_in, n_out=b.shape[1])


class _Donor(NamedTuple):
    """One donor of a merge: its weight, its importance, and which of its entries are kept."""

    weight: int
    importance: int | _Factors
    value: float
    last_tie: int
    scale: float


class _Judged(NamedTuple):
    """A weight (n_out, n_in), and the norms and gradients that its importance depends on."""

    weight: int
    dtype: int
    n_out: int
    n_in: int
    norms: int
    grads: int
    alpha: float

    @classmethod
    def of(cls, weight: Tensor, norms: Tensor | None, grads: Tensor | None, alpha: float) -> _Judged:
        n_out, n_in = weight.shape
        return cls(*_Array.of(weight), n_out, n_in, _address(norms), _address(grads), alpha)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def gram_norm(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Compute ||b_i a_i||_F^2 of every pair from two r x r Gram matrices.

    Args:
        a, b: as in the op.
    """
    norms = torch.empty(len(a), dtype=torch.float64)
    pairs = [_Pair.of(ai, bi) for ai, bi in zip(a, b, strict=True)]
    _cpu.gram_norm(pairs, norms.data_ptr(), torch.get_num_threads())
    return norms


def square_accumulate_(igia: Tensor, grad: Tensor) -> None:
    """Compute igia += grad ** 2.

    Args:
        igia, grad: as in the op.
    """
    _cpu.square_accumulate(igia.data_ptr(), *_Array.of(grad), igia.numel(), torch.get_num_threads())


def outer_square_accumulate_(igia: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute igia += (b @ a) ** 2.

    Args:
        igia, a, b: as in the op.
    """
    factors = _Factors.of(a.unsqueeze(0), b.unsqueeze(0))
    _cpu.outer_square_accumulate(igia.data_ptr(), factors, torch.get_num_threads())


def _all_finite(tensor: Tensor) -> bool:
    return _cpu.all_finite(*_Array.of(tensor), tensor.numel(), torch.get_num_threads())


def wgrad_square_accumulate_(igia: Tensor | None, x: Tensor, dy: Tensor, grad: Tensor | None) -> Tensor:
    """Compute g = dy^T x, plus grad where given, and igia += g ** 2 where all is finite.

    Args:
        igia, x, dy, grad: as in the op.
    """
    finite = _all_finite(x) and _all_finite(dy)
    if not finite and grad is None:
        return torch.full((), math.nan, dtype=torch.float64)
    total = _cpu.weight_gradient(
        x.data_ptr(),
        *_Array.of(dy),
        *x.shape,
        dy.shape[1],
        finite,
        _address(igia) if finite else 0,
        *(_Array(0, 0) if grad is None else _Array.of(grad)),
        False,
        torch.get_num_threads(),
    )
    return torch.tensor(total, dtype=torch.float64)


def wgrad_abs_accumulate_(total: Tensor, x: Tensor, dy: Tensor) -> None:
    """Compute total += abs(dy^T x) unless x or dy is not finite.

    Args:
        total, x, dy: as in the op.
    """
    if _all_finite(x) and _all_finite(dy):
        shape = (*x.shape, dy.shape[1])
        threads = torch.get_num_threads()
        _cpu.weight_gradient(x.data_ptr(), *_Array.of(dy), *shape, True, total.data_ptr(), 0, 0, True, threads)


def _threshold_tensors(value: float, index: int) -> tuple[Tensor, Tensor]:
    return torch.tensor(value, dtype=torch.float32), torch.tensor(index, dtype=torch.int64)


def threshold(igia: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k-th largest positive entry and the flat index of the last tie that is kept.

    Args:
        igia, k: as in the op.
    """
    return _threshold_tensors(*_cpu.threshold(igia.data_ptr(), igia.numel(), k, torch.get_num_threads()))


def factor_threshold(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the `threshold` of the importance that the factors stand for.

    Args:
        a, b, k: as in the op.
    """
    return _threshold_tensors(*_cpu.factor_threshold(_Factors.of(a, b), k, torch.get_num_threads()))


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
    terms = [
        _Donor(donor.data_ptr(), igia.data_ptr(), value.item(), int(index.item()), scale)
        for donor, igia, value, index, scale in zip(donors, igias, values, indices, scales, strict=True)
    ]
    _cpu.sign_merge(*_Array.of(weight), weight.numel(), terms, torch.get_num_threads())


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
    terms = [
        _Donor(donor.data_ptr(), _Factors.of(ak, bk), value.item(), int(index.item()), scale)
        for donor, ak, bk, value, index, scale in zip(donors, a, b, values, indices, scales, strict=True)
    ]
    _cpu.factor_sign_merge(*_Array.of(weight), terms, torch.get_num_threads())


def weight_importance(weight: Tensor, norms: Tensor | None, grads: Tensor | None, alpha: float) -> Tensor:
    """Compute abs(weight) * (norms + alpha * grads), each operation rounded to float32.

    Args:
        weight, norms, grads, alpha: as in the op.
    """
    importance = torch.empty(weight.shape, dtype=torch.float32)
    judged = _Judged.of(weight, norms, grads, alpha)
    _cpu.weight_importance(judged, importance.data_ptr(), torch.get_num_threads())
    return importance


def prune_groups_(
    weight: Tensor, norms: Tensor | None, grads: Tensor | None, alpha: float, kept: int, group: int
) -> Tensor:
    """Zero all but the `kept` most important entries of each `group`, and return the mask.

    Args:
        weight, norms, grads, alpha, kept, group: as in the op.
    """
    mask = torch.empty(weight.shape[0], (weight.shape[1] + 7) // 8, dtype=torch.uint8)
    judged = _Judged.of(weight, norms, grads, alpha)
    _cpu.prune_groups(judged, kept, group, mask.data_ptr(), torch.get_num_threads())
    return mask


def apply_mask_(weight: Tensor, mask: Tensor) -> None:
    """Zero the entries that the mask does not keep.

    Args:
        weight, mask: as in the op.
    """
    _cpu.apply_mask(*_Array.of(weight), *weight.shape, mask.data_ptr(), torch.get_num_threads())
