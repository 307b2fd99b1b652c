"""Zero all but the most important entries of each group of a weight (out, in).

The weight is read from memory once. Small groups are pruned by rank, large ones by a boundary.

Source: docs/method.md, section 7.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from gradpruner.kernels import prune_by_boundary, prune_by_rank
from gradpruner.kernels.device import on_device_of
from gradpruner.kernels.weight_mask import pack


def prune_groups_(
    weight: Tensor, norms: Tensor | None, grads: Tensor | None, alpha: float, kept: int, group: int
) -> Tensor:
    """Prune groups and return the mask. See `gradpruner.ops.prune_groups_`.

    Args:
        weight, norms, grads, alpha, kept, group: as in the op.
    """
    n_out, n_in = weight.shape
    mask = torch.empty(n_out, triton.cdiv(n_in, 8), dtype=torch.uint8, device=weight.device)
    small = group <= prune_by_rank.LARGEST
    # A program writes whole bytes of the mask. If its entries may end inside a byte, each has a byte of its own first.
    whole_bytes = group & (group - 1) == 0 if small else group % 8 == 0 or group == n_in
    keep = mask if whole_bytes else torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    with on_device_of(weight):
        if small:
            launch = prune_by_rank.launch_of(group)
            parts = triton.cdiv(n_in, launch["GROUPS"] * group)
            prune_by_rank.prune_by_rank_kernel[(n_out * parts,)](
                weight, norms, grads, keep, alpha, kept, n_in, **launch
            )
        else:
            prune_by_boundary.prune_by_boundary_kernel[(n_out * (n_in // group),)](
                weight,
                norms,
                grads,
                keep,
                alpha,
                kept,
                group,
                n_in,
                PACKED=whole_bytes,
                **prune_by_boundary.launch_of(group),
            )
        if not whole_bytes:
            pack(mask, keep)
    return mask
