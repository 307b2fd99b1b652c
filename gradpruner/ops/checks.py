"""What every op asks of its arguments: dtypes, shapes, devices. Errors name the argument, what it is and what fits."""

from __future__ import annotations

import torch
from torch import Tensor

from gradpruner.errors import InvalidArgument

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FACTORS = (torch.float32, torch.bfloat16)


def need(condition: bool, message: str) -> None:
    """Raises InvalidArgument with the message unless the condition holds."""
    if not condition:
        raise InvalidArgument(message)


def need_dtype(name: str, tensor: Tensor, accepted: tuple[torch.dtype, ...]) -> None:
    """Raises InvalidArgument unless the dtype is one of those accepted."""
    need(tensor.dtype in accepted, f"{name} has dtype {tensor.dtype}; accepted are {list(accepted)}")


def need_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises InvalidArgument unless the tensor has this shape."""
    need(tuple(tensor.shape) == shape, f"{name} has shape {tuple(tensor.shape)}; expected {shape}")


def need_same_device(first: Tensor, *others: Tensor) -> None:
    """Raises InvalidArgument unless all are on one device."""
    for other in others:
        need(other.device == first.device, f"tensors on {first.device} and {other.device}; expected one device")


def need_count(name: str, items: list[Tensor], count: int) -> None:
    """Raises InvalidArgument unless there is one entry for each donor."""
    need(len(items) == count, f"{name} has {len(items)} entries; expected {count}, one for each donor")


def need_factors(a: Tensor, b: Tensor) -> None:
    """Raises InvalidArgument unless a and b are factors of one matrix: (t, r, in) and (t, out, r), one dtype."""
    need_dtype("a", a, FACTORS)
    need_dtype("b", b, FACTORS)
    need(
        a.ndim == 3 and b.ndim == 3 and a.shape[0] == b.shape[0] and a.shape[1] == b.shape[2],
        f"factors have shapes a {tuple(a.shape)} and b {tuple(b.shape)}; expected (t, r, in) and (t, out, r)",
    )
    need(a.dtype == b.dtype, f"factors have dtypes a {a.dtype} and b {b.dtype}; expected the same")
    need_same_device(a, b)


def need_tokens(x: Tensor, dy: Tensor) -> None:
    """Raises InvalidArgument unless these are the inputs (tokens, in) of a linear and its output's gradient."""
    need_dtype("x", x, FLOATS)
    need(dy.dtype == x.dtype, f"dy has dtype {dy.dtype} and x {x.dtype}; expected the same")
    need(
        x.ndim == 2 and dy.ndim == 2 and x.shape[0] == dy.shape[0],
        f"shapes x {tuple(x.shape)}, dy {tuple(dy.shape)}; expected (tokens, in) and (tokens, out)",
    )
