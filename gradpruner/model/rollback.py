"""Put a model back as it was before a change that failed: structure, attributes and values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def restorer(model: nn.Module, values: Iterable[Tensor] = (), *, aside: str | None = "cpu") -> Callable[[], None]:
    """Return a function that puts every module of a model back as it is now.

    Submodules, parameters and attributes are the same objects again then.

    Args:
        model: the model that may change.
        values: tensors that may change in place. Each is copied here, and written back then.
        aside: the device of the copies, by default host memory. None keeps each copy on the device of its tensor.

    Returns:
        The function. It takes no arguments.
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
        for container, content in contents:
            _refill(container, content)
        with torch.no_grad():
            for tensor, storage, before in copies:
                tensor.data = storage  # the same storage as before, which others may share
                storage.copy_(before)

    return restore


def _refill(container: Any, content: Any) -> None:
    """Give a dict, list or set its former content back. It stays the same object."""
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)
