"""Compute the importance of single weights (out, in): abs(weight) times a factor.

The factor is norms + alpha * grads, of norms (in,) and grads (out, in). Every operation is rounded to float32.

Source: docs/method.md, section 7.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradpruner.kernels.device import on_device_of
from gradpruner.kernels.numeric import widen

# Without fused multiply-adds `norms + alpha * grads` rounds twice, as it does in torch.
LAUNCH = {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def importance_of(raw, norms, grads, alpha, column, at, inside):
    """Return the importance of loaded weights, float32.

    What is not above zero, a NaN too, becomes zero.

    raw: the weights.
    norms, grads: their addresses, or None.
    column, at: where the entries of these weights are in norms and in grads.
    """
    found = tl.abs(widen(raw).to(tl.float32))
    if grads is not None:
        factor = alpha * tl.load(grads + at, mask=inside, other=0.0)
        if norms is not None:
            factor = tl.load(norms + column, mask=inside, other=0.0) + factor
        found = found * factor
    elif norms is not None:
        found = found * tl.load(norms + column, mask=inside, other=0.0)
    return tl.where(found > 0, found, 0.0)


@triton.jit
def weight_importance_kernel(found, weight, norms, grads, alpha, n_in, BLOCK: tl.constexpr):
    """Compute one block of one row."""
    blocks = tl.cdiv(n_in, BLOCK)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    at = (tl.program_id(0) // blocks).to(tl.int64) * n_in + column
    inside = column < n_in
    raw = tl.load(weight + at, mask=inside, other=0.0)
    tl.store(found + at, importance_of(raw, norms, grads, alpha, column, at, inside), mask=inside)


def weight_importance(weight: Tensor, norms: Tensor | None, grads: Tensor | None, alpha: float) -> Tensor:
    """Compute the importance of every entry. See `gradpruner.ops.weight_importance`.

    Args:
        weight, norms, grads, alpha: as in the op.
    """
    n_out, n_in = weight.shape
    found = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    with on_device_of(weight):
        grid = (n_out * triton.cdiv(n_in, LAUNCH["BLOCK"]),)
        weight_importance_kernel[grid](found, weight, norms, grads, alpha, n_in, **LAUNCH)
    return found
