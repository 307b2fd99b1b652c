"""One check for every argument that is a whole number."""

from __future__ import annotations

from fractions import Fraction

from gradpruner.errors import InvalidArgument


def need_whole(name: str, value: object, least: int, what: str = "a whole number") -> None:
    """Raise InvalidArgument unless `value` is an int, not a bool, of `least` or more. what: what it stands for."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidArgument(f"{name} = {value!r}; expected {what}, {least} or more")


def share_of(top: float) -> Fraction:
    """The share `top` as it was written, not its nearest double: floor(0.57 * 100) is 57. Raises InvalidArgument."""
    if isinstance(top, bool) or not isinstance(top, (int, float, Fraction)) or not 0 < top <= 1:
        raise InvalidArgument(f"top = {top!r}; accepted is a share above 0 and up to 1")
    return Fraction(str(top))
