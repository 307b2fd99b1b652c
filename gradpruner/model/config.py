"""Where a transformers config describes a decoder and counts its layers."""

from __future__ import annotations

from typing import Any

from torch import nn

# What configurations call the number of decoder layers. An encoder-decoder has a field of the first group; its
# `num_hidden_layers` counts the layers of the encoder.
DECODER_COUNTS = ("decoder_layers", "num_decoder_layers")
COUNTS = ("num_hidden_layers", "num_layers", "num_blocks")


def text_config(config: Any) -> Any:
    """Return the part of a config that describes the decoder: the object itself, not a copy."""
    if not hasattr(config, "get_text_config"):
        return config
    text = config.get_text_config(decoder=True)
    return config if type(text) is type(config) else text  # of a flat encoder-decoder, transformers gives a copy


def layer_counts(config: Any) -> list[tuple[str, int]]:
    """Return the fields of a config that count the decoder's layers, with their values."""
    text = text_config(config)
    for names in (DECODER_COUNTS, COUNTS):
        values = [(name, getattr(text, name, None)) for name in names]
        counts = [(name, value) for name, value in values if type(value) is int]
        if counts:
            return counts
    return []


def nearest_config(base: nn.Module, path: str) -> Any:
    """Return the config of the innermost module around a submodule that has one.

    Args:
        base: the model.
        path: where the submodule is in it, e.g. "model.language_model.layers".

    Returns:
        A transformers config, or None if no module around it has one.
    """
    while path:
        path = path.rpartition(".")[0]
        config = getattr(base.get_submodule(path), "config", None)
        if config is not None:
            return config
    return None
