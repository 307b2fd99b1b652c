"""Names with options, such as "gblm:p=1,alpha=10": from text to objects and back."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from gradpruner.checks import check_choice
from gradpruner.errors import InvalidArgument

Named = TypeVar("Named")


class Registry(Mapping[str, type[Named]]):
    """Classes by name. A built-in class is imported when it is first asked for.

    The names are known without any import, so that a command line can list them at once.

    Args:
        modules: for each built-in name, the module that registers the class of that name.
    """

    def __init__(self, modules: Mapping[str, str]) -> None:
        self._modules = modules
        self._classes: dict[str, type[Named]] = {}

    def add(self, name: str, named: type[Named]) -> None:
        """Make a class known by a name. A class that had this name before is replaced.

        Args:
            name: what users write.
            named: a dataclass. Its fields are the options of the name.
        """
        module = self._modules.get(name)
        if module not in (None, named.__module__):
            importlib.import_module(module)  # now: imported later, it would replace the class that replaces its own
        self._classes[name] = named

    def __getitem__(self, name: str) -> type[Named]:
        """The class of a name. Raises KeyError if there is none."""
        if name not in self._classes and name in self._modules:
            importlib.import_module(self._modules[name])
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        """All names: first the built-in ones, then those that were added, each in its order."""
        return iter(dict.fromkeys((*self._modules, *self._classes)))

    def __len__(self) -> int:
        """How many names there are."""
        return len({*self._modules, *self._classes})

    def __contains__(self, name: object) -> bool:
        """Whether a class of this name can be had."""
        return name in self._modules or name in self._classes


def parse_options(text: str, known: Mapping[str, type[Named]]) -> Named:
    """Make the object that a name with options stands for.

    Args:
        text: "name", or "name:option=value,option=value". Values are read as by `value_of`.
        known: dataclasses by name. Their fields are the options.

    Returns:
        An instance of the class of that name.

    Raises:
        InvalidArgument: the name or an option is not known, or the class refuses a value.
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


def format_options(name: str, options: Any) -> str:
    """Write a name with its options as text. This is the opposite of `parse_options`.

    Args:
        name: the registered name.
        options: a dataclass. Fields that have their default value are left out.

    Returns:
        "name", or "name:option=value,option=value".
    """
    changed = [
        f"{field.name}={_text(getattr(options, field.name))}"
        for field in dataclasses.fields(options)
        if getattr(options, field.name) != field.default
    ]
    return name + (":" + ",".join(changed) if changed else "")


def value_of(text: str) -> Any:
    """Read the value of an option: true, false, none, a number, or otherwise the text itself."""
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
