"""Method "magnitude": remove the layers with the smallest weights."""

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
    """Remove the layers whose weights have the smallest norm.

    Args:
        patch: whether gaps are patched, see `Dropping`. Default False.
        adapters: "keep" or "discard", see `Dropping`. Default "discard".
        rank_factor: see `Dropping`. Default 1.

    Source: Kim et al. 2024, Shortened LLaMA. There, |w| is summed instead of w².
    """

    name: ClassVar[str] = "magnitude"

    def scores(self, clues: Clues) -> Sequence[float]:
        """Compute the Frobenius norm of each layer.

        It is the root of the sum of w² over the layer's linear weights. Norms, biases and routers do not count. The sum
        is not divided by the number of weights, so a layer with more weights counts as larger.

        Args:
            clues: only the model is used.

        Returns:
            One norm per layer.

        Raises:
            UnsupportedModel: weights are quantised, or a layer has no linear weight of its own.
        """
        with torch.no_grad():
            return [
                math.hypot(*(float(torch.linalg.vector_norm(w.cpu(), dtype=torch.float64)) for w in weights))
                for weights in linear_parameters(Decoder(clues.model))
            ]


def linear_parameters(decoder: Decoder) -> list[list[nn.Parameter]]:
    """The linear weights of each layer.

    Args:
        decoder: the layers of the model.

    Returns:
        One list per layer.

    Raises:
        UnsupportedModel: a weight is quantised, or a layer has no linear weight of its own.
    """
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
