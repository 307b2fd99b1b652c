"""The importance of single weights: abs(W) times a factor, each operation rounded to float32.

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
    """Importance of weights that were loaded, float32; what is not above zero, a NaN too, becomes zero.

    norms, grads: None where absent. column, at: where the weights lie in norms and in grads.
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
    """One block of one row."""
    blocks = tl.cdiv(n_in, BLOCK)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    at = (tl.program_id(0) // blocks).to(tl.int64) * n_in + column
    inside = column < n_in
    raw = tl.load(weight + at, mask=inside, other=0.0)
    tl.store(found + at, importance_of(raw, norms, grads, alpha, column, at, inside), mask=inside)


def weight_importance(weight: Tensor, norms: Tensor | None, grads: Tensor | None, alpha: float) -> Tensor:
    """abs(weight) * (norms + alpha * grads), each operation rounded to float32 (docs/method.md, section 7)."""
    n_out, n_in = weight.shape
    found = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    with on_device_of(weight):
        grid = (n_out * triton.cdiv(n_in, LAUNCH["BLOCK"]),)
        weight_importance_kernel[grid](found, weight, norms, grads, alpha, n_in, **LAUNCH)
    return found
