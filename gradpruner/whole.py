"""One check for every argument that is a whole number."""

from __future__ import annotations

from gradpruner.errors import InvalidArgument


def need_whole(name: str, value: object, least: int, what: str = "a whole number") -> None:
    """Raise InvalidArgument unless `value` is an int, not a bool, of `least` or more. what: what it stands for."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidArgument(f"{name} = {value!r}; expected {what}, {least} or more")
