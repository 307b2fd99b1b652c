"""The loss on labelled tokens, from no more logits than it needs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from gradpruner.model.modes import evaluating

IGNORED = -100  # the label that cross entropy skips
LOGITS_AT_ONCE = 2**24  # entries widened to float32 at a time: 64 MiB


def answer_logits(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Compute the logits that predict labelled tokens, without gradients or dropout.

    The head is a large part of a small model, and answers are short: where the model accepts `logits_to_keep`, the
    logits of other positions are not computed.

    Args:
        model: a transformers model, or a PEFT model around one.
        batch: keyword arguments of the model, on its device. `labels` is int64 of shape (rows, tokens), -100 where
            nothing is to be predicted.

    Returns:
        Logits of shape (rows, positions, vocabulary) in the model's own dtype, and the labels of shape
        (rows, positions) that they predict. Only positions that predict a label of some row are there.
    """
    labels: Tensor = batch["labels"][:, 1:]  # the logits at one position predict the next token
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    positions = (labels != IGNORED).any(0).nonzero().flatten()
    # the `forward` of a PEFT model hides the arguments of the model in it
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    with evaluating(model):
        if "logits_to_keep" in inspect.signature(plain.forward).parameters:
            logits = model(**inputs, use_cache=False, logits_to_keep=positions).logits
        else:
            logits = model(**inputs, use_cache=False).logits[:, positions]
    return logits, labels[:, positions]


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> float:
    """Sum the cross entropy over labelled tokens, in nats.

    Args:
        logits: shape (tokens, vocabulary), any float dtype. They are widened to float32 in parts.
        labels: int64 of shape (tokens,). Those that are -100 do not count.
    """
    tokens_at_once = max(1, LOGITS_AT_ONCE // logits.shape[-1])
    total = 0.0
    for part, targets in zip(logits.split(tokens_at_once), labels.split(tokens_at_once), strict=True):
        losses = cross_entropy(part.float(), targets, ignore_index=IGNORED, reduction="none")
        total += float(losses.cpu().double().sum())  # not every device has float64
    return total
