"""Which tokens of a batch count, and which sequence each belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FULL_MASK = 4  # dimensions of a mask with a row for each query: (rows, heads, queries, keys)


def tokens_and_sequences(batch: Mapping[str, Any], like: Tensor) -> tuple[Tensor, Tensor]:
    """Find the real tokens of a batch, and number its sequences.

    A batch that is packed or padding-free has several sequences in a row. They are known by position ids that begin
    again at 0, or by a mask that counts the sequences. Every row begins a sequence too.

    Args:
        batch: keyword arguments of the model.
        like: a state of each token, shape (rows, tokens, width).

    Returns:
        Whether each token is real, boolean (rows, tokens). The index of its sequence in the batch, ascending from 0,
        int64 (rows, tokens).
    """
    shape, device = like.shape[:2], like.device
    real = torch.ones(shape, dtype=torch.bool, device=device)
    starts = torch.zeros_like(real)
    starts[:, 0] = True
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == FULL_MASK:
        # A real token sees itself. In a mask of floats, 0 lets through.
        seen = mask.to(device).diagonal(dim1=2, dim2=3)[:, 0]
        real = seen if seen.dtype == torch.bool else seen == 0
        real = real.expand(shape)
    elif isinstance(mask, Tensor):
        counted = mask.to(device)
        real = counted.bool()
        if not mask.is_floating_point() and mask.shape == shape and int(mask.max()) > 1:
            starts[:, 1:] |= counted[:, 1:] != counted[:, :-1]
    positions = batch.get("position_ids")
    if isinstance(positions, Tensor) and positions.shape == shape:
        again = positions.to(device) == 0
        if mask is None:  # padding of a padding-free batch: its positions are 0, one after the other
            end = torch.ones_like(again[:, :1])
            real = ~(again & torch.cat([again[:, 1:], end], dim=1)) if bool((~again).any()) else real
        starts |= again
    return real, starts.flatten().cumsum(0).reshape(shape) - 1
