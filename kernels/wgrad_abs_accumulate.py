"""Compute total += abs(dy^T x) of x (tokens, in) and dy (tokens, out).

The kernel is that of `wgrad_square_accumulate`, which adds absolute values instead of squares here.

Source: docs/method.md, section 7 (GBLM-Pruner).
"""

from __future__ import annotations

import triton
from torch import Tensor

from gradpruner.kernels.device import on_device_of
from gradpruner.kernels.wgrad_square_accumulate import LAUNCH, OPTIONS, bounds_of, wgrad_kernel


def wgrad_abs_accumulate_(total: Tensor, x: Tensor, dy: Tensor) -> None:
    """Add absolute values of a weight gradient. See `gradpruner.ops.wgrad_abs_accumulate_`.

    Args:
        total, x, dy: as in the op.
    """
    tokens, n_in = x.shape
    n_out = dy.shape[1]
    launch = LAUNCH[x.element_size()]
    tiles = triton.cdiv(n_out, launch["ROWS"]) * triton.cdiv(n_in, launch["COLS"])
    with on_device_of(x):
        bounds = bounds_of(x, dy)
        wgrad_kernel[(tiles,)](
            total, None, x, dy, bounds, None, bounds.numel(), tokens, n_out, n_in, ABSOLUTE=True, **launch, **OPTIONS
        )
