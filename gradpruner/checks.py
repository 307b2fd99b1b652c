"""Checks of arguments.

Each raises InvalidArgument, which names the argument, what was given and what is accepted.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import TypeGuard

from gradpruner.errors import InvalidArgument


def is_int(value: object) -> TypeGuard[int]:
    """Whether a value is an int and not a bool. Python counts bools as ints."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is an int or a float and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_int(name: str, value: object, least: int, what: str = "a whole number") -> None:
    """Refuse everything but an int of `least` or more.

    Args:
        name: the argument, as the caller wrote it.
        value: what was given.
        least: the smallest number that is accepted.
        what: how the message describes the number, e.g. "a number of steps".

    Raises:
        InvalidArgument: `value` is not an int, is a bool, or is less than `least`.
    """
    if not is_int(value) or value < least:
        raise InvalidArgument(f"{name} = {value!r}; expected {what}, {least} or more")


def check_bool(name: str, value: object) -> None:
    """Refuse everything but True and False.

    Args:
        name: the argument, as the caller wrote it.
        value: what was given.

    Raises:
        InvalidArgument: `value` is something else.
    """
    if not isinstance(value, bool):
        raise InvalidArgument(f"{name} = {value!r}; accepted are True and False")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuse a value that is not one of several names.

    Args:
        name: the argument, as the caller wrote it.
        value: what was given.
        choices: the names that are accepted, in the order in which the error lists them.

    Raises:
        InvalidArgument: `value` is not among them.
    """
    accepted = list(choices)
    if value not in accepted:
        raise InvalidArgument(f"{name} = {value!r}; accepted are {', '.join(accepted)}")


def exact_share(name: str, value: object) -> Fraction:
    """Return a share as the exact fraction that was written, so that 0.57 of 100 is 57.

    In floating point, floor(0.57 * 100) is 56.

    Args:
        name: the argument, as the caller wrote it.
        value: a number above 0 and up to 1.

    Returns:
        The share as a fraction.

    Raises:
        InvalidArgument: `value` is not such a number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, Fraction)) or not 0 < value <= 1:
        raise InvalidArgument(f"{name} = {value!r}; accepted is a share above 0 and up to 1")
    return Fraction(str(value))
