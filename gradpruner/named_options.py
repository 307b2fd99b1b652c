"""Names with options, such as "gblm:p=1,alpha=10": dataclasses from text and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from gradpruner.checks import check_choice
from gradpruner.errors import InvalidArgument

Named = TypeVar("Named")


def parse(text: str, known: Mapping[str, type[Named]]) -> Named:
    """Make a dataclass object from its name and its options.

    Args:
        text: "name" or "name:option=value,option=value". An option that is not named has its default.
        known: the dataclasses by name.

    Raises:
        InvalidArgument: `text` names an unknown class or option, or the class refuses a value.
    """
    name, _, rest = text.partition(":")
    check_choice("method", name, sorted(known))
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
    """Return the text from which `parse` makes an object.

    It has the name, and the options that differ from their defaults.

    Args:
        name: the name of its class in the registry.
        thing: the dataclass object.
    """
    changed = [
        f"{field.name}={_text(getattr(thing, field.name))}"
        for field in dataclasses.fields(thing)
        if getattr(thing, field.name) != field.default
    ]
    return name + (":" + ",".join(changed) if changed else "")


def value_of(text: str) -> Any:
    """Return what an option's text means: a bool, None, a number, or else the text itself."""
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
