"""Layers of multi-token prediction, which a config counts and a loaded model lacks.

Loading leaves these layers out. A folder whose config still counts them makes converters and servers look for weights
that are not there.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)


def extra_counts(config: Any) -> list[tuple[Any, str, int]]:
    """Find the fields of a config, and of its parts, that count such layers.

    Returns:
        For each field the part that has it (an object or a dict), its name, and the number of layers.
    """
    counts = []
    for name, value in list((config if isinstance(config, dict) else vars(config)).items()):
        if type(value) is int and value > 0 and _counts_layers(str(name)):
            counts.append((config, str(name), value))
        elif isinstance(value, (dict, PreTrainedConfig)):
            counts += extra_counts(value)
    return counts


def _counts_layers(name: str) -> bool:
    return ("mtp" in name or "nextn" in name) and name.endswith(("layers", "modules"))


def assign(part: Any, name: str, value: Any) -> None:
    """Set a field of a part of a config.

    Args:
        part: the part, an object or a dict.
        name: the field.
        value: its new value.
    """
    if isinstance(part, dict):
        part[name] = value
    else:
        setattr(part, name, value)


def without_extra(config: Any) -> Any:
    """Return a copy of a config that counts no such layers."""
    new = copy.deepcopy(config)
    for part, name, _ in extra_counts(new):
        assign(part, name, 0)
    return new


def log_counts_set_to_zero(counts: Sequence[tuple[Any, str, int]]) -> None:
    """Log which fields were set to 0, and why."""
    if counts:
        named = ", ".join(f"{name} = {value}" for _, name, value in counts)
        logger.warning(
            f"config.{named}: the model has no such layers, since transformers does not load them; it is 0 now"
        )


def generation_changes(fields: Mapping[str, Any], kept: Sequence[int], *, extra_gone: bool) -> dict[str, Any]:
    """Find what must change in a generation config after layers were removed.

    An early exit after n layers becomes an exit after as many of these n as are kept.

    Args:
        fields: the generation config, as a mapping.
        kept: indices of the kept layers.
        extra_gone: whether the counts of extra layers were set to 0.

    Returns:
        The fields with another value than before, with their new values.
    """
    changes: dict[str, Any] = {}
    early = fields.get("assistant_early_exit")
    if type(early) is int:
        changes["assistant_early_exit"] = sum(layer < early for layer in kept) or None
    if extra_gone and fields.get("use_mtp"):
        changes["use_mtp"] = None
    return {name: value for name, value in changes.items() if value != fields[name]}
