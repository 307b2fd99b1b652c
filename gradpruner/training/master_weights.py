"""Train half-precision weights in float32, and give them their own dtype back afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from gradpruner.errors import GradPrunerError

HALF = (torch.bfloat16, torch.float16)


def trains_in_half(model: nn.Module) -> bool:
    """Return whether a weight that trains is bfloat16 or float16."""
    return any(p.requires_grad and p.dtype in HALF for p in model.parameters())


@contextlib.contextmanager
def float32_masters(model: nn.Module) -> Iterator[None]:
    """Make every weight that trains float32 inside the block, and its own dtype afterwards.

    The parameters stay the same objects. An optimizer step changes a weight by about the learning rate, which is often
    less than half precision can add to it. Float16 gradients and their squares leave the range of float16.

    Raises:
        GradPrunerError: a trained weight is outside the range of its own dtype.

    Source: Micikevicius et al. 2018, section 3.1.
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
