"""Prepare a model and its inputs for a forward pass, and restore the model afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradpruner.model.four_bits import not_rearranging


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, a model is in evaluation mode and computes no gradients.

    Afterwards, every module has its own mode again.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), not_rearranging(model):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def keeping_grad_flags(model: nn.Module) -> Iterator[None]:
    """Inside, `requires_grad` of parameters may be changed. It is restored afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def to_device(batch: Mapping[str, Any], device: torch.device, *, labels: bool = True) -> dict[str, Any]:
    """Return a batch with its tensors on a device.

    Args:
        batch: keyword arguments of a model. Values that are not tensors stay as they are.
        device: where the tensors are copied to.
        labels: False leaves the entry "labels" out, so that the model computes no loss.

    Returns:
        A new dict. The batch itself is not changed.
    """
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if labels or name != "labels"
    }
