"""The state of a model around a forward pass: its mode, what trains, and on which device the inputs are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; every module's own mode again outside."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def keeping_grad_flags(model: nn.Module) -> Iterator[None]:
    """Inside, `requires_grad` of parameters may be changed; outside, each has its own again."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def to_device(batch: Mapping[str, Any], device: torch.device, *, labels: bool = True) -> dict[str, Any]:
    """A batch with its tensors on a device.

    Args:
        batch: keyword arguments of a model. Values that are no tensors stay as they are.
        device: where the tensors go.
        labels: False leaves the entry "labels" out, so that the model computes no loss.

    Returns:
        A new dict. The batch itself is not changed.
    """
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if labels or name != "labels"
    }
