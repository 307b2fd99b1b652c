"""Ops compute on row-major tensors: copies stand in for tensors that lie otherwise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TypeVar

from torch import Tensor

MaybeTensor = TypeVar("MaybeTensor", Tensor, "Tensor | None")


@contextlib.contextmanager
def updated(tensor: MaybeTensor) -> Iterator[MaybeTensor]:
    """Give a row-major tensor to compute into, and write the result back into the original.

    A tensor that is row-major already is given itself. Nothing is written back after an error. None stays None.
    """
    if tensor is None:
        yield tensor
        return
    target = tensor.contiguous()
    yield target
    if target is not tensor:
        tensor.copy_(target)


def read_only(tensor: MaybeTensor) -> MaybeTensor:
    """Return a tensor, or a row-major copy of one that lies otherwise. None stays None."""
    return None if tensor is None else tensor.contiguous()


def all_read_only(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return `read_only` of each tensor."""
    return [tensor.contiguous() for tensor in tensors]
