"""A model of a config without values: its names, shapes and attributes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from gradpruner.errors import UnsupportedModel
from gradpruner.model.decoder import base_name, is_packed
from gradpruner.model.extra_layers import extra_counts, without_extra


def build_empty(kind: type[nn.Module], config: Any) -> nn.Module:
    """A model of this class and config on the meta device: names, shapes and attributes, no data."""
    try:
        with torch.device("meta"):
            return kind(copy.deepcopy(config))
    except Exception as error:
        raise UnsupportedModel(f"{kind.__name__} cannot be rebuilt from its config: {error}") from error


def absent_counts(kind: type[nn.Module], config: Any) -> list[tuple[Any, str, int]]:
    """What `extra_counts` finds, if a model of this class is the same without; nothing where it has such layers."""
    counts = extra_counts(config)
    if not counts or _shapes(build_empty(kind, config)) != _shapes(build_empty(kind, without_extra(config))):
        return []
    return counts


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...] | None]:
    """Name to shape, without adapters; None where a quantiser packed the parameter."""
    return {
        name: None if is_packed(tensor) else tuple(tensor.shape)
        for raw, tensor in model.named_parameters(remove_duplicate=False)
        if (name := base_name(raw)) is not None
    }
