"""The loss on labelled tokens, summed without holding all logits at once."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

IGNORED = -100  # the label that cross entropy skips


LOGITS_AT_ONCE = 2**24  # entries widened to float32 at a time: 64 MiB


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Sum over labelled tokens; widens only some of the logits (tokens, vocabulary) to float32 at a time."""
    step = max(1, LOGITS_AT_ONCE // logits.shape[-1])
    total = 0.0
    for part, targets in zip(logits.split(step), labels.split(step), strict=True):
        losses = cross_entropy(part.float(), targets, ignore_index=IGNORED, reduction="none")
        total += float(losses.double().sum())
    return total
