"""The loss on labelled tokens, computed without widening all logits at once."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

IGNORED = -100  # the label of tokens that do not count
LOGITS_AT_ONCE = 2**24  # entries widened to float32 at a time: 64 MiB


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Sum the cross entropy of all labelled tokens.

    Only a part of the logits is widened to float32 at a time (see `LOGITS_AT_ONCE`).

    Args:
        logits: (tokens, vocabulary), any float dtype.
        labels: int64 (tokens,). Tokens with the label -100 do not count.

    Returns:
        The sum, in nats.
    """
    step = max(1, LOGITS_AT_ONCE // logits.shape[-1])
    total = 0.0
    for part, targets in zip(logits.split(step), labels.split(step), strict=True):
        losses = cross_entropy(part.float(), targets, ignore_index=IGNORED, reduction="none")
        total += float(losses.double().sum())
    return total
