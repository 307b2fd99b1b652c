"""What every launch needs: a check of the device, the current device, tables of addresses."""

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

# Decided when the kernels are decorated. So it is read from a kernel, and not from the environment again.
INTERPRETED = not isinstance(widen, triton.JITFunction)

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Make the tensor's GPU the current one, as a Triton launch needs it.

    Raises:
        InvalidArgument: the tensor is on the CPU, and the interpreter does not run.
    """
    if tensor.device.type == "cpu" and not INTERPRETED:
        raise InvalidArgument(
            "the triton backend was given tensors on cpu; accepted are tensors on a GPU, "
            "or any with TRITON_INTERPRET=1 set before Triton is imported"
        )
    return torch.cuda.device_of(tensor)


def table_on(device: torch.device, rows: list[list[int]]) -> Tensor:
    """Copy a table of addresses and sizes to a device, without waiting for the copy.

    Args:
        device: where the kernel runs.
        rows: one row per tensor or donor.

    Returns:
        The table, int64.
    """
    table = torch.tensor(rows, dtype=torch.int64)
    if device.type == "cpu":
        return table
    return table.pin_memory().to(device, non_blocking=True)


def common_alignment(numbers: Iterable[int]) -> int:
    """Return 16 if every number is a multiple of 16, else 1.

    A kernel that knows that addresses are multiples of 16 loads 16 bytes at once.
    """
    return 16 if all(number % 16 == 0 for number in numbers) else 1
