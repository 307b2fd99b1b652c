"""Models without values, built from a config to compare names and shapes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from gradpruner.errors import UnsupportedModel
from gradpruner.model.decoder import base_name, is_packed
from gradpruner.model.extra_layers import extra_counts, without_extra


def build_empty(kind: type[nn.Module], config: Any) -> nn.Module:
    """Build a model on the meta device: it has names, shapes and attributes, but no data.

    Args:
        kind: the class of the model.
        config: its transformers configuration. It is not changed.

    Raises:
        UnsupportedModel: the class refuses the configuration.
    """
    try:
        with torch.device("meta"):
            return kind(copy.deepcopy(config))
    except Exception as error:
        raise UnsupportedModel(f"{kind.__name__} cannot be rebuilt from its config: {error}") from error


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...] | None]:
    """Return the shapes of a model's parameters by name, without adapters.

    The shape of a parameter that a quantiser packed is None.
    """
    return {
        name: None if is_packed(tensor) else tuple(tensor.shape)
        for raw, tensor in model.named_parameters(remove_duplicate=False)
        if (name := base_name(raw)) is not None
    }


def absent_counts(kind: type[nn.Module], config: Any) -> list[tuple[Any, str, int]]:
    """Find counts of extra layers in a config whose model does not have these layers.

    Args:
        kind: the class of the model.
        config: its transformers configuration.

    Returns:
        What `extra_counts` finds, if a model of this class is the same without them. Else an empty list.
    """
    counts = extra_counts(config)
    if not counts or shapes_of(build_empty(kind, config)) != shapes_of(build_empty(kind, without_extra(config))):
        return []
    return counts
