"""What every launcher needs from the device: a check, the right current device, tables of addresses."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradpruner.errors import InvalidArgument
from gradpruner.kernels.numeric import widen

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])

# Decided when the kernels were decorated, so read from a kernel and not from the environment again.
INTERPRETED = not isinstance(widen, triton.JITFunction)

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Make the tensor's GPU the current one, as a Triton launch needs it.

    Raises InvalidArgument for a CPU tensor unless the interpreter runs.
    """
    if tensor.device.type == "cpu" and not INTERPRETED:
        raise InvalidArgument(
            "the triton backend was given tensors on cpu; accepted are tensors on a GPU, "
            "or any with TRITON_INTERPRET=1 set before Triton is imported"
        )
    return torch.cuda.device_of(tensor)


def table_on(device: torch.device, rows: list[list[int]]) -> Tensor:
    """One int64 row a tensor (addresses, sizes) on the device, without waiting for the copy."""
    table = torch.tensor(rows, dtype=torch.int64)
    if device.type == "cpu":
        return table
    return table.pin_memory().to(device, non_blocking=True)


def common_alignment(numbers: Iterable[int]) -> int:
    """16 if every number is a multiple of 16, else 1: what a kernel may assume to load 16 bytes at once."""
    return 16 if all(number % 16 == 0 for number in numbers) else 1
