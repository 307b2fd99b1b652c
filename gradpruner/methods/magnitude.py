"""magnitude: the layers with the smallest weights go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from gradpruner.errors import UnsupportedModel
from gradpruner.methods.base import Clues, Dropping, register
from gradpruner.model.decoder import Decoder, is_packed


@register
@dataclass(frozen=True)
class Magnitude(Dropping):
    """Remove the layers of least norm (source: Kim et al. 2024, Shortened LLaMA, which adds |w| up instead)."""

    name: ClassVar[str] = "magnitude"

    def scores(self, clues: Clues) -> Sequence[float]:
        """The Frobenius norm of all linear weights of a layer as one vector: no norms, biases, routers.

        Not divided by the number of weights: a layer with more of them counts as larger. Raises UnsupportedModel
        if weights are packed by a quantiser, or a layer has no linear weight of its own.
        """
        with torch.no_grad():
            return [
                math.hypot(*(float(torch.linalg.vector_norm(w.cpu(), dtype=torch.float64)) for w in weights))
                for weights in linear_parameters(Decoder(clues.model))
            ]


def linear_parameters(decoder: Decoder) -> list[list[nn.Parameter]]:
    """The linear weights of each layer. Raises UnsupportedModel if a quantiser packed one, or a layer has none."""
    layers: list[list[nn.Parameter]] = [[] for _ in decoder.layers]
    for weight in decoder.weights:
        parameter = decoder.parameter(weight)
        if is_packed(parameter):
            raise UnsupportedModel(f"layer {weight.layer} {weight.name} is quantised: its values cannot be read")
        layers[weight.layer].append(parameter)
    bare = [layer for layer, weights in enumerate(layers) if not weights]
    if bare:
        raise UnsupportedModel(f"layers {bare} have no linear weight of their own: nothing there can be scored")
    return layers
