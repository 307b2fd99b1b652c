"""Closures of `optimizer.step`: the gradient exists only after the optimizer called them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gradpruner.errors import ProbeError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def closure_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[..., Any] | None:
    """Find the closure among the arguments of `optimizer.step`.

    Args:
        args: positional arguments as a step hook gets them, the optimizer first.
        kwargs: keyword arguments.

    Returns:
        The closure, or None if `step` was called without one.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    return closure if callable(closure) else None


class ReadAfterClosure:
    """A closure that calls another one, then reads the gradients that it computed.

    Args:
        closure: the closure that was given to `optimizer.step`.
        read: reads the gradients.
    """

    def __init__(self, closure: Callable[..., Any], read: Callable[[], None]) -> None:
        self._closure, self._read, self.calls = closure, read, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the closure returns. Raises ProbeError at the second call in one step."""
        loss = self._closure(*args, **kwargs)
        self.calls += 1
        if self.calls > 1:
            raise ProbeError(
                "the optimizer called its closure a second time in one step, so the step has no gradient of its own; "
                "probe with an optimizer that uses one gradient per step"
            )
        self._read()
        return loss

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """Put this closure in the place of the original one.

        Args:
            args: positional arguments of `step`, the optimizer first.
            kwargs: keyword arguments of `step`.

        Returns:
            The arguments to call `step` with.
        """
        if "closure" in kwargs:
            return args, {**kwargs, "closure": self}
        return (args[0], self, *args[2:]), dict(kwargs)
