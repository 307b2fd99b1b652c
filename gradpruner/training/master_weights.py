"""Weights that train in half precision: float32 while they train, and their own dtype before and after."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from gradpruner.errors import GradPrunerError

HALF = (torch.bfloat16, torch.float16)


def trains_in_half(model: nn.Module) -> bool:
    """Whether a weight that trains is bfloat16 or float16."""
    return any(p.requires_grad and p.dtype in HALF for p in model.parameters())


@contextlib.contextmanager
def float32_masters(model: nn.Module) -> Iterator[None]:
    """Inside, every weight that trains is float32; afterwards it has its own dtype again. The parameters stay the same.

    An optimizer step changes a weight by about the learning rate, which is often less than half precision can add to
    it, and float16 gradients and squares leave the range of float16. Source: Micikevicius et al. 2018, section 3.1.
    Raises GradPrunerError where a trained weight is outside the range of its own dtype.
    """
    halves = [(n, p, p.dtype) for n, p in model.named_parameters() if p.requires_grad and p.dtype in HALF]
    for _, parameter, _ in halves:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for _, parameter, dtype in halves:
            parameter.grad = None  # float32, which no longer fits
            parameter.data = parameter.data.to(dtype)
    for name, parameter, dtype in halves:
        if not bool(torch.isfinite(parameter).all()):
            raise GradPrunerError(f"{name} was trained beyond the range of {dtype}; load the model in float32")
