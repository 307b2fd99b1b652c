"""Masks as bits: eight entries of a row per byte, the lowest bit first.

`gradpruner.ops` writes them in the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack(kept: Tensor) -> Tensor:
    """Pack a boolean mask (out, in) into uint8 (out, ceil(in / 8)).

    Bits past the last column are zero.
    """
    places = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=kept.device)
    return (pad(kept, (0, -kept.shape[1] % 8)).view(kept.shape[0], -1, 8) * places).sum(-1, dtype=torch.uint8)


def unpack(mask: Tensor, width: int) -> Tensor:
    """Unpack bits into a boolean mask (out, width).

    Args:
        mask: uint8 (out, ceil(width / 8)).
        width: number of columns.
    """
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (mask.unsqueeze(-1) >> places & 1).flatten(1)[:, :width].bool()
