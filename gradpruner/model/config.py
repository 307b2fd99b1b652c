"""Where a transformers config counts its decoder layers."""

from __future__ import annotations

from typing import Any

from torch import nn

# What configurations call the number of decoder layers; an encoder-decoder's `num_hidden_layers` counts the encoder's.
DECODER_COUNTS = ("decoder_layers", "num_decoder_layers")


COUNTS = ("num_hidden_layers", "num_layers", "num_blocks")


def _nearest_config(base: nn.Module, name: str) -> Any:
    """The configuration of the innermost module around `name` that has one."""
    while name:
        name = name.rpartition(".")[0]
        config = getattr(base.get_submodule(name), "config", None)
        if config is not None:
            return config
    return None


def text_config(config: Any) -> Any:
    """The part of a transformers configuration that describes the decoder: the object itself, not a copy."""
    if not hasattr(config, "get_text_config"):
        return config
    text = config.get_text_config(decoder=True)
    return config if type(text) is type(config) else text  # of a flat encoder-decoder transformers gives a copy


def layer_counts(config: Any) -> list[tuple[str, int]]:
    """The fields of a configuration that count the decoder's layers, with their values."""
    text = text_config(config)
    for names in (DECODER_COUNTS, COUNTS):
        counts = [(name, getattr(text, name, None)) for name in names]
        found = [(name, count) for name, count in counts if type(count) is int]
        if found:
            return found
    return []
