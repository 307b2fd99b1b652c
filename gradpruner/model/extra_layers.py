"""Layers that a configuration counts and its model does not have: of multi-token prediction, which loading leaves out.

A folder that still counts them sends converters and servers to look for weights that are not in it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)


def extra_counts(config: Any) -> list[tuple[Any, str, int]]:
    """Where a configuration counts such layers, in its parts too: the part (an object or a dict), name, number."""
    found = []
    for name, value in list((config if isinstance(config, dict) else vars(config)).items()):
        if type(value) is int and value > 0 and _counts_layers(str(name)):
            found.append((config, str(name), value))
        elif isinstance(value, (dict, PreTrainedConfig)):
            found += extra_counts(value)
    return found


def _counts_layers(name: str) -> bool:
    return ("mtp" in name or "nextn" in name) and name.endswith(("layers", "modules"))


def assign(part: Any, name: str, value: Any) -> None:
    """Set a field of a part of a configuration."""
    if isinstance(part, dict):
        part[name] = value
    else:
        setattr(part, name, value)


def without_extra(config: Any) -> Any:
    """A copy of a configuration that counts none of them."""
    new = copy.deepcopy(config)
    for part, name, _ in extra_counts(new):
        assign(part, name, 0)
    return new


def say_what_is_gone(counts: Sequence[tuple[Any, str, int]]) -> None:
    """Log which fields say 0 now."""
    if counts:
        named = ", ".join(f"{name} = {value}" for _, name, value in counts)
        logger.warning(f"config.{named}: the model has no such layers, transformers does not load them; it says 0 now")


def generation_changes(fields: Mapping[str, Any], kept: Sequence[int], *, extra_gone: bool) -> dict[str, Any]:
    """What a generation config has to say of the layers that are left, where it says something of them.

    An early exit after n layers becomes one after as many of them as are kept.
    """
    changes: dict[str, Any] = {}
    early = fields.get("assistant_early_exit")
    if type(early) is int:
        changes["assistant_early_exit"] = sum(layer < early for layer in kept) or None
    if extra_gone and fields.get("use_mtp"):
        changes["use_mtp"] = None
    return {name: value for name, value in changes.items() if value != fields[name]}
