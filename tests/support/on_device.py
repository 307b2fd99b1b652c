"""Runs an op on another device than the one where a test keeps its tensors.

The tests of this folder build their inputs and their expectations on the CPU. With GRADPRUNER_TEST_DEVICE=cuda each op
gets copies of its arguments on the card, and what it wrote and returned comes back.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DEVICE = os.environ.get("GRADPRUNER_TEST_DEVICE", "")


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors of one shape hold the same bits, NaN included."""
    return torch.equal(x.contiguous().flatten().view(torch.uint8), y.contiguous().flatten().view(torch.uint8))


def copied(value: Any, device: str, pairs: list[tuple[Tensor, Tensor]]) -> Any:
    """`value` with every tensor copied to the device, strides and all; `pairs` gets (original, copy) of each."""
    if isinstance(value, Tensor):
        extent = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)) + 1
        store = torch.zeros(extent if value.numel() else 0, dtype=value.dtype, device=device)
        there = store.as_strided(value.shape, value.stride()) if value.numel() else store.view(value.shape)
        if value.numel():
            there.copy_(value.detach())
        pairs.append((value, there))
        return there
    if isinstance(value, (list, tuple)):
        return type(value)(copied(item, device, pairs) for item in value)
    return value


def returned(value: Any) -> Any:
    """A result of an op, on the CPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    return type(value)(map(returned, value)) if isinstance(value, (list, tuple)) else value


def on_device(op: Callable[..., Any], device: str) -> Callable[..., Any]:
    """`op`, computed on the device: its arguments go there, and what it wrote and returned comes back."""

    @functools.wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        pairs: list[tuple[Tensor, Tensor]] = []
        there = {name: copied(value, device, pairs) for name, value in kwargs.items()}
        answer = op(*copied(args, device, pairs), **there)
        for original, copy in pairs:
            here = copy.cpu()
            if not same_bits(original, here):  # what an op only reads keeps its bits, or a test sees the difference
                original.data.copy_(here)
        return returned(answer)

    return call


def placed(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of an op that is called past `gradpruner.ops`: on the device of this run."""
    return copied(args, DEVICE, []) if DEVICE else args
