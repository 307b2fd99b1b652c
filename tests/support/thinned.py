"""Parameters of which some run by default, and the rest in CI."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

IN_CI = [pytest.mark.slow, pytest.mark.in_ci]


def thinned(values: Iterable[Any], default: Callable[[int, Any], bool]) -> list[Any]:
    """The values of a `parametrize` mark; those for which `default` is false run in CI only.

    Args:
        values: one per case. A tuple holds one value per parameter.
        default: called with the number of the case and its value.
    """
    return [
        value
        if default(number, value)
        else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=IN_CI)
        for number, value in enumerate(values)
    ]


def every(step: int) -> Callable[[int, Any], bool]:
    """Every `step`-th case by default, the first one included."""
    return lambda number, value: number % step == 0
