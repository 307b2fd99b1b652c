"""Optimizers as training loops hold them."""

from __future__ import annotations

from typing import Any

import torch


def unwrapped(optimizer: Any) -> Any:
    """The optimizer that really steps, inside accelerate's wrapper; any other as it is."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer
