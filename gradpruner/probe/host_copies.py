"""Copies from devices to host memory that nothing waits for until they are read."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Arrival:
    """A point in time on some devices; `wait` returns when earlier work has finished.

    The point is behind all that was launched there before.

    Args:
        devices: any devices. The CPU and the meta device need no waiting.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._marks = [mark(device) for device in dict.fromkeys(devices) if device.type not in ("cpu", "meta")]

    def wait(self) -> None:
        """Wait for the devices. What was launched later may still be running."""
        for reached in self._marks:
            reached.synchronize()


def mark(device: torch.device) -> torch.Event:
    """Record an event behind all that was launched on the device's current stream."""
    event = torch.Event(device)
    event.record(torch.accelerator.current_stream(device))
    return event


def to_host(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Start copying tensors to host memory.

    The copies are views of one new block, which is pinned if a GPU writes to it. Torch reuses a freed pinned block for
    the next one of its size, so drop all views early. Tensors that are neighbours in the list and on one device are
    packed there, converted, and copied at once. That takes the room of their copies on the device for a moment.

    Args:
        tensors: the tensors. Work that is launched later may change them.
        dtype: dtype of the copies.

    Returns:
        One copy per tensor, in the same order. Copies from a GPU may still be under way: see `Arrival`.
    """
    sizes = [tensor.numel() for tensor in tensors]
    block = torch.empty(sum(sizes), dtype=dtype, pin_memory=any(tensor.is_cuda for tensor in tensors))
    views = [flat.view(tensor.shape) for flat, tensor in zip(block.split(sizes), tensors, strict=True)]
    first = 0
    for device, group in itertools.groupby(tensors, lambda tensor: tensor.device):
        neighbours = list(group)
        count = sum(tensor.numel() for tensor in neighbours)
        part = block[first : first + count]
        first += count
        if len(neighbours) == 1 and neighbours[0].dtype == dtype:
            part.copy_(neighbours[0].reshape(-1), non_blocking=True)
            continue
        packed = part if device.type == "cpu" else torch.empty(count, dtype=dtype, device=device)
        pieces = packed.split([tensor.numel() for tensor in neighbours])
        torch._foreach_copy_([p.view(t.shape) for p, t in zip(pieces, neighbours, strict=True)], neighbours)
        if packed is not part:
            part.copy_(packed, non_blocking=True)
    return views


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate float64 vectors in host memory. Copies from a GPU may still be under way."""
    sizes = [len(part) for part in parts]
    whole = torch.empty(sum(sizes), dtype=torch.float64, pin_memory=any(part.is_cuda for part in parts))
    for place, part in zip(whole.split(sizes), parts, strict=True):
        place.copy_(part, non_blocking=True)
    return whole


def one_ahead(tensors: Iterable[tuple[T, Tensor]]) -> Iterator[tuple[T, Tensor]]:
    """Yield tensors in host memory; the next one is copied while this one is used.

    Tensors in host memory are yielded themselves.
    """
    current: tuple[T, Tensor, Arrival] | None = None
    for key, tensor in tensors:
        host = tensor if tensor.device.type == "cpu" else to_host([tensor], tensor.dtype)[0]
        following = (key, host, Arrival([tensor.device]))
        if current is not None:
            current[2].wait()
            yield current[:2]
        current = following
    if current is not None:
        current[2].wait()
        yield current[:2]
