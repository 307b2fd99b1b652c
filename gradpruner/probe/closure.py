"""A closure given to `optimizer.step`: there is no gradient of the step before the optimizer has called it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from gradpruner.errors import InvalidArgument, ProbeError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def closure_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[..., Any] | None:
    """What `step` was given to compute loss and gradients with. args: as a step hook gets them, the optimizer first."""
    given = kwargs.get("closure", args[1] if len(args) > 1 else None)
    return given if callable(given) else None


def check_one_gradient(optimizer: Any) -> None:
    """Raises InvalidArgument for an optimizer that computes several gradients in a step."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise InvalidArgument(
            "optimizer is LBFGS, which calls its closure several times in a step: a step has no gradient of its own; "
            "expected an optimizer that uses one gradient a step"
        )


class ReadAfterClosure:
    """Calls `read` right after the closure of a step, which has cleared and computed gradients, and clipped them."""

    def __init__(self, closure: Callable[..., Any], read: Callable[[], None]) -> None:
        self._closure, self._read, self.calls = closure, read, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the closure returns. Raises ProbeError if the optimizer calls it again in the same step."""
        loss = self._closure(*args, **kwargs)
        self.calls += 1
        if self.calls > 1:
            raise ProbeError(
                "the optimizer called its closure a second time in one step, so the step has no gradient of its own; "
                "probe with an optimizer that uses one gradient a step"
            )
        self._read()
        return loss

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """Those of `step` with this in the place of the closure."""
        if "closure" in kwargs:
            return args, {**kwargs, "closure": self}
        return (args[0], self, *args[2:]), dict(kwargs)
