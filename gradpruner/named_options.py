"""Names with options, "gblm:p=1,alpha=10": dataclasses from text and back, by a registry of their names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from gradpruner.errors import InvalidArgument

Named = TypeVar("Named")


def parse(text: str, known: Mapping[str, type[Named]]) -> Named:
    """What `known` has under "name", or under "name:option=value,option=value" with these. Raises InvalidArgument."""
    name, _, rest = text.partition(":")
    if name not in known:
        raise InvalidArgument(f"method = {name!r}; accepted are {', '.join(sorted(known))}")
    fields = [field.name for field in dataclasses.fields(known[name])]  # type: ignore[arg-type]
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if key not in fields or not equals:
            listed = ", ".join(fields) or "none"
            raise InvalidArgument(f"method {name!r}: {part!r} is no option=value; its options are {listed}")
        options[key] = value_of(value)
    return known[name](**options)


def spelled(name: str, thing: Any) -> str:
    """The opposite of `parse`: the name and every option that is not as by default."""
    changed = [
        f"{field.name}={_text(getattr(thing, field.name))}"
        for field in dataclasses.fields(thing)
        if getattr(thing, field.name) != field.default
    ]
    return name + (":" + ",".join(changed) if changed else "")


def value_of(text: str) -> Any:
    """What an option's text means: a truth value, nothing, a number, or else itself."""
    words: dict[str, Any] = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
