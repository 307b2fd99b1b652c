"""The CPU backend: tensors become addresses, sizes and dtype codes for the C++ extension `gradpruner._cpu`.

Every function here keeps its tensors alive until the call returns. `GRADPRUNER_CPU_ISA` (portable, avx2,
avx512, avx512bf16, amx) forces an instruction set; by default it is the best that the machine has.
"""

from __future__ import annotations

import math
import os

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


def _array(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), _CODES[tensor.dtype]


def _factors(a: Tensor, b: Tensor) -> tuple[int, int, int, int, int, int, int]:
    steps, rank, width = a.shape
    return a.data_ptr(), b.data_ptr(), _CODES[a.dtype], steps, rank, width, b.shape[1]


def gram_norm(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """||b_i a_i||_F^2 of every pair, float64 (n,), from two r x r Gram matrices (source: D)."""
    norms = torch.empty(len(a), dtype=torch.float64)
    pairs = [
        (ai.data_ptr(), _CODES[ai.dtype], bi.data_ptr(), _CODES[bi.dtype], *ai.shape, bi.size(0))
        for ai, bi in zip(a, b, strict=True)
    ]
    _cpu.gram_norm(pairs, norms.data_ptr(), torch.get_num_threads())
    return norms


def square_accumulate_(igia: Tensor, grad: Tensor) -> None:
    """igia += grad ** 2 (source: P eq. 3)."""
    _cpu.square_accumulate(igia.data_ptr(), *_array(grad), igia.numel(), torch.get_num_threads())


def outer_square_accumulate_(igia: Tensor, a: Tensor, b: Tensor) -> None:
    """igia += (b @ a) ** 2 (source: P eq. 2 and 3)."""
    factors = _factors(a.unsqueeze(0), b.unsqueeze(0))
    _cpu.outer_square_accumulate(igia.data_ptr(), factors, torch.get_num_threads())


def _all_finite(tensor: Tensor) -> bool:
    return _cpu.all_finite(*_array(tensor), tensor.numel(), torch.get_num_threads())


def wgrad_square_accumulate_(igia: Tensor | None, x: Tensor, dy: Tensor, grad: Tensor | None) -> Tensor:
    """g = dy^T x, plus grad where given; igia += g ** 2 unless x, dy or g is not finite (source: D)."""
    finite = _all_finite(x) and _all_finite(dy)
    if not finite and grad is None:
        return torch.full((), math.nan, dtype=torch.float64)
    total = _cpu.weight_gradient(
        x.data_ptr(),
        *_array(dy),
        *x.shape,
        dy.shape[1],
        finite,
        igia.data_ptr() if igia is not None and finite else 0,
        *(_array(grad) if grad is not None else (0, 0)),
        False,
        torch.get_num_threads(),
    )
    return torch.tensor(total, dtype=torch.float64)


def wgrad_abs_accumulate_(total: Tensor, x: Tensor, dy: Tensor) -> None:
    """total += abs(dy^T x) unless x or dy is not finite (docs/method.md, section 7)."""
    if _all_finite(x) and _all_finite(dy):
        shape = (*x.shape, dy.shape[1])
        threads = torch.get_num_threads()
        _cpu.weight_gradient(x.data_ptr(), *_array(dy), *shape, True, total.data_ptr(), 0, 0, True, threads)


def _threshold_tensors(value: float, index: int) -> tuple[Tensor, Tensor]:
    return torch.tensor(value, dtype=torch.float32), torch.tensor(index, dtype=torch.int64)


def threshold(igia: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k-th largest positive entry and the flat index of the last tie that is kept (docs/method.md, section 3)."""
    return _threshold_tensors(*_cpu.threshold(igia.data_ptr(), igia.numel(), k, torch.get_num_threads()))


def factor_threshold(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`threshold` of the importance that the factors stand for (docs/method.md, section 3)."""
    return _threshold_tensors(*_cpu.factor_threshold(_factors(a, b), k, torch.get_num_threads()))


def sign_merge_(
    weight: Tensor,
    donors: list[Tensor],
    igias: list[Tensor],
    values: list[Tensor],
    indices: list[Tensor],
    scales: list[float],
) -> None:
    """weight += sum_k scale_k * mask_k * [sign(donor_k) == sign(weight)] * donor_k (docs/method.md, section 3)."""
    terms = [
        (donor.data_ptr(), igia.data_ptr(), value.item(), index.item(), scale)
        for donor, igia, value, index, scale in zip(donors, igias, values, indices, scales, strict=True)
    ]
    _cpu.sign_merge(*_array(weight), weight.numel(), terms, torch.get_num_threads())


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
    terms = [
        (donor.data_ptr(), _factors(ak, bk), value.item(), index.item(), scale)
        for donor, ak, bk, value, index, scale in zip(donors, a, b, values, indices, scales, strict=True)
    ]
    _cpu.factor_sign_merge(*_array(weight), terms, torch.get_num_threads())


def _weight(weight: Tensor, norms: Tensor | None, grads: Tensor | None, alpha: float) -> tuple:
    judged_by = (0 if tensor is None else tensor.data_ptr() for tensor in (norms, grads))
    return (*_array(weight), *weight.shape, *judged_by, alpha)


def weight_importance(weight: Tensor, norms: Tensor | None, grads: Tensor | None, alpha: float) -> Tensor:
    """abs(weight) * (norms + alpha * grads), each operation rounded to float32 (docs/method.md, section 7)."""
    found = torch.empty(weight.shape, dtype=torch.float32)
    _cpu.weight_importance(_weight(weight, norms, grads, alpha), found.data_ptr(), torch.get_num_threads())
    return found


def prune_groups_(
    weight: Tensor, norms: Tensor | None, grads: Tensor | None, alpha: float, kept: int, group: int
) -> Tensor:
    """Zero all but the `kept` most important of each `group`; the mask, 8 a byte (docs/method.md, section 7)."""
    mask = torch.empty(weight.shape[0], (weight.shape[1] + 7) // 8, dtype=torch.uint8)
    of = _weight(weight, norms, grads, alpha)
    _cpu.prune_groups(of, kept, group, mask.data_ptr(), torch.get_num_threads())
    return mask


def apply_mask_(weight: Tensor, mask: Tensor) -> None:
    """Zero what the mask does not keep (docs/method.md, section 7)."""
    _cpu.apply_mask(*_array(weight), *weight.shape, mask.data_ptr(), torch.get_num_threads())
