"""A module tree as it was before a change that failed: structure, attributes and values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def restorer(model: nn.Module, values: Iterable[Tensor] = (), *, aside: str | None = "cpu") -> Callable[[], None]:
    """What puts every module of `model` back: its submodules, parameters and attributes are the same objects again.

    values: tensors that may change in place, each copied here and written back then. aside: the device of the copies,
    by default host memory; None: that of the tensor.
    """
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    held = {id(v): v for _, known in attributes for v in known.values() if isinstance(v, (dict, list, set))}
    contents = [(container, copy.copy(container)) for container in held.values()]
    distinct = {id(tensor): tensor for tensor in values}.values()
    copies = [(tensor, tensor.data, tensor.detach().to(aside or tensor.device, copy=True)) for tensor in distinct]

    def restore() -> None:
        for module, known in attributes:
            vars(module).clear()
            vars(module).update(known)
        for container, was in contents:
            _refill(container, was)
        with torch.no_grad():
            for tensor, storage, before in copies:
                tensor.data = storage  # others may know it, and a change may have put another in its place
                storage.copy_(before)

    return restore


def _refill(container: Any, content: Any) -> None:
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)
