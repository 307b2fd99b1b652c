"""Count the parameters that each decoder layer holds alone, or together with other layers."""

from __future__ import annotations

from typing import TypedDict

from gradpruner.errors import UnsupportedModel
from gradpruner.model.decoder import Decoder, base_shapes
from gradpruner.model.empty_model import build_empty
from gradpruner.model.layer_config import cut_config


class ParameterCounts(TypedDict):
    """What a plan needs to know about a model's parameters. Adapters do not count.

    Args:
        layer_parameters: for each layer, how many parameters are removed with it in any case.
        shared_parameters: sets of layers that share parameters, with the number that is removed when all layers of
            the set are removed.
        total_parameters: the number of the whole model. Tied parameters count once.
    """

    layer_parameters: tuple[int, ...]
    shared_parameters: tuple[tuple[tuple[int, ...], int], ...]
    total_parameters: int


def count_parameters(decoder: Decoder) -> ParameterCounts:
    """Count the parameters of single layers, of sets of layers, and of the model."""
    head = f"{decoder.path}."
    sizes: dict[int, int] = {}  # by the id of the parameter
    owners: dict[int, set[int | None]] = {}  # layers that hold it; None stands for everything outside the layers
    for name, parameter, shape in base_shapes(decoder.base):
        layer = int(name.removeprefix(head).partition(".")[0]) if name.startswith(head) else None
        sizes[id(parameter)] = shape.numel()
        owners.setdefault(id(parameter), set()).add(layer)
    own = [_outside_per_layer(decoder)] * len(decoder.layers)
    shared: dict[tuple[int, ...], int] = {}
    for parameter_id, holders in owners.items():
        layers = tuple(sorted(layer for layer in holders if layer is not None))
        if None in holders:
            continue  # removing layers does not remove it
        if len(layers) == 1:
            own[layers[0]] += sizes[parameter_id]
        else:
            shared[layers] = shared.get(layers, 0) + sizes[parameter_id]
    return {
        "layer_parameters": tuple(own),
        "shared_parameters": tuple(sorted(shared.items())),
        "total_parameters": sum(sizes.values()),
    }


def _outside_per_layer(decoder: Decoder) -> int:
    """Count the parameters outside the layers that are removed with each layer.

    Gemma 3n has such: its embeddings have a part per layer. To find them, a model without its last layers is built
    without values, from the configuration that a cut would write.
    """
    count = len(decoder.layers)
    if not hasattr(decoder.config, "get_text_config"):
        return 0
    head = f"{decoder.path}."
    before = {name: shape.numel() for name, _, shape in base_shapes(decoder.base) if not name.startswith(head)}
    for kept in range(count - 1, 0, -1):  # a configuration may refuse some numbers of layers
        try:
            small = build_empty(type(decoder.base), cut_config(decoder.config, tuple(range(kept)), count))
        except UnsupportedModel:
            continue
        lost = [before[name] - shape.numel() for name, _, shape in base_shapes(small) if name in before]
        return sum(lost) // (count - kept)
    return 0
