"""total += abs(dy^T x): the tiles of `wgrad_square_accumulate_` with another end.

Source: docs/method.md, section 7 (GBLM-Pruner).
"""

from __future__ import annotations

import triton
from torch import Tensor

from gradpruner.kernels.device import on_device_of
from gradpruner.kernels.wgrad_square_accumulate import LAUNCH, OPTIONS, bounds_of, wgrad_kernel


def wgrad_abs_accumulate_(total: Tensor, x: Tensor, dy: Tensor) -> None:
    """total += abs(dy^T x) unless x or dy is not finite (docs/method.md, section 7)."""
    tokens, n_in = x.shape
    n_out = dy.shape[1]
    launch = LAUNCH[x.element_size()]
    tiles = triton.cdiv(n_out, launch["ROWS"]) * triton.cdiv(n_in, launch["COLS"])
    with on_device_of(x):
        bounds = bounds_of(x, dy)
        wgrad_kernel[(tiles,)](
            total, None, x, dy, bounds, None, bounds.numel(), tokens, n_out, n_in, ABSOLUTE=True, **launch, **OPTIONS
        )
