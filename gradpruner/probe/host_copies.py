"""Copies from devices to host memory that nobody waits for until they are read."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Arrival:
    """A point in the work that some devices were given: all that was launched there so far.

    devices: any, of which those that work as they are asked (CPU) or not at all (meta) are never waited for.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._marks = [mark(device) for device in dict.fromkeys(devices) if device.type not in ("cpu", "meta")]

    def wait(self) -> None:
        """Until the devices have come that far; what was launched later may still be under way."""
        for reached in self._marks:
            reached.synchronize()


def mark(device: torch.device) -> torch.Event:
    """An event behind all that the device's current stream was given."""
    event = torch.Event(device)
    event.record(torch.accelerator.current_stream(device))
    return event


def to_host(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies in host memory, under way where a tensor is on a GPU: one copy for neighbours on one device.

    All are views of one new block, pinned if a GPU writes to it. Torch keeps pinned blocks that were freed for the next
    of their size: whoever drops all views early has the memory used again. Neighbours are packed, and converted to
    `dtype`, on their own device: that takes there, for the moment, the room of their copies. What is launched later
    may change the tensors.
    """
    sizes = [tensor.numel() for tensor in tensors]
    block = torch.empty(sum(sizes), dtype=dtype, pin_memory=any(tensor.is_cuda for tensor in tensors))
    views = [flat.view(tensor.shape) for flat, tensor in zip(block.split(sizes), tensors, strict=True)]
    first = 0
    for device, group in itertools.groupby(tensors, lambda tensor: tensor.device):
        here = list(group)
        count = sum(tensor.numel() for tensor in here)
        part = block[first : first + count]
        first += count
        if len(here) == 1 and here[0].dtype == dtype:
            part.copy_(here[0].reshape(-1), non_blocking=True)
            continue
        packed = part if device.type == "cpu" else torch.empty(count, dtype=dtype, device=device)
        pieces = packed.split([tensor.numel() for tensor in here])
        torch._foreach_copy_([p.view(t.shape) for p, t in zip(pieces, here, strict=True)], here)
        if packed is not part:
            part.copy_(packed, non_blocking=True)
    return views


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Vectors of float64 one behind the other, in host memory; a copy each, under way where they are on a GPU."""
    sizes = [len(part) for part in parts]
    whole = torch.empty(sum(sizes), dtype=torch.float64, pin_memory=any(part.is_cuda for part in parts))
    for place, part in zip(whole.split(sizes), parts, strict=True):
        place.copy_(part, non_blocking=True)
    return whole


def one_ahead(tensors: Iterable[tuple[T, Tensor]]) -> Iterator[tuple[T, Tensor]]:
    """Each tensor in host memory, itself where it is there already; the next is copied while this one is used."""
    before: tuple[T, Tensor, Arrival] | None = None
    for key, tensor in tensors:
        host = tensor if tensor.device.type == "cpu" else to_host([tensor], tensor.dtype)[0]
        coming = (key, host, Arrival([tensor.device]))
        if before is not None:
            before[2].wait()
            yield before[:2]
        before = coming
    if before is not None:
        before[2].wait()
        yield before[:2]
