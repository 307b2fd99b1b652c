"""Checks of the tensors that ops take.

Each error names the argument, what was given and what is accepted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradpruner.errors import InvalidArgument

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FACTORS = (torch.float32, torch.bfloat16)


def need(condition: bool, message: str) -> None:
    """Raise InvalidArgument unless a condition holds.

    Args:
        condition: what must be true.
        message: what the error says.
    """
    if not condition:
        raise InvalidArgument(message)


def need_dtype(name: str, tensor: Tensor, accepted: tuple[torch.dtype, ...]) -> None:
    """Raise InvalidArgument unless a tensor has one of the accepted dtypes.

    Args:
        name: the argument, as the caller knows it.
        tensor: what was given.
        accepted: the dtypes that the op computes with.
    """
    need(tensor.dtype in accepted, f"{name} has dtype {tensor.dtype}; accepted are {list(accepted)}")


def need_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise InvalidArgument unless a tensor has this shape.

    Args:
        name: the argument, as the caller knows it.
        tensor: what was given.
        shape: the only shape that fits the other arguments.
    """
    need(tuple(tensor.shape) == shape, f"{name} has shape {tuple(tensor.shape)}; expected {shape}")


def need_same_device(first: Tensor, *others: Tensor) -> None:
    """Raise InvalidArgument unless all tensors are on one device.

    Args:
        first: the tensor whose device counts.
        *others: the tensors that are compared with it.
    """
    for other in others:
        need(other.device == first.device, f"tensors on {first.device} and {other.device}; expected one device")


def need_count(name: str, items: list[Tensor], count: int) -> None:
    """Raise InvalidArgument unless a list has one entry per donor.

    Args:
        name: the argument, as the caller knows it.
        items: what was given.
        count: the number of donors.
    """
    need(len(items) == count, f"{name} has {len(items)} entries; expected {count}, one for each donor")


def need_factors(a: Tensor, b: Tensor) -> None:
    """Raise InvalidArgument unless two tensors are the factors of one matrix.

    Args:
        a: expected as (t, r, in), float32 or bfloat16.
        b: expected as (t, out, r), of the dtype and on the device of `a`.
    """
    need_dtype("a", a, FACTORS)
    need_dtype("b", b, FACTORS)
    need(
        a.ndim == 3 and b.ndim == 3 and a.shape[0] == b.shape[0] and a.shape[1] == b.shape[2],
        f"factors have shapes a {tuple(a.shape)} and b {tuple(b.shape)}; expected (t, r, in) and (t, out, r)",
    )
    need(a.dtype == b.dtype, f"factors have dtypes a {a.dtype} and b {b.dtype}; expected the same")
    need_same_device(a, b)


def need_tokens(x: Tensor, dy: Tensor) -> None:
    """Raise InvalidArgument unless two tensors are a linear's inputs and its output's gradient.

    Args:
        x: expected as (tokens, in), any float dtype.
        dy: expected as (tokens, out), of the dtype of `x`.
    """
    need_dtype("x", x, FLOATS)
    need(dy.dtype == x.dtype, f"dy has dtype {dy.dtype} and x {x.dtype}; expected the same")
    need(
        x.ndim == 2 and dy.ndim == 2 and x.shape[0] == dy.shape[0],
        f"shapes x {tuple(x.shape)}, dy {tuple(dy.shape)}; expected (tokens, in) and (tokens, out)",
    )
