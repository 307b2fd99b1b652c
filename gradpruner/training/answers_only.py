"""Compute logits only where a token with a label is predicted: the same loss for less work.

The head and the softmax are a large part of a training step of a model with few layers and a large vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gradpruner.model.loss import IGNORED
from gradpruner.model.modes import evaluating
from gradpruner.model.wrappers import is_peft


def answers_only(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same inputs, but ask for no logits beside those that predict a label."""
    labels = nn.functional.pad(inputs["labels"], (0, 1), value=IGNORED)[:, 1:]
    positions = (labels != IGNORED).any(0).nonzero().flatten()
    return {**inputs, "logits_to_keep": positions, "shift_labels": labels[:, positions]}


def can_skip_logits(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Return whether the loss stays the same with `answers_only`.

    Not every model knows the arguments that it adds.

    Args:
        model: a transformers model or a PEFT model.
        inputs: one batch with labels. The loss of its first row is computed both ways.
    """
    plain = model.get_base_model() if is_peft(model) else model  # type: ignore[operator]
    if "logits_to_keep" not in inspect.signature(plain.forward).parameters:
        return False
    row = {name: value[:1] for name, value in inputs.items()}
    with evaluating(model):
        expected = model(**row).loss
        try:
            loss = model(**answers_only(row)).loss
        except (TypeError, ValueError):  # labels and logits of unequal length
            return False
    return torch.allclose(loss.float(), expected.float(), rtol=1e-2, atol=1e-3)
