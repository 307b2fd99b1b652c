"""How many parameters go with which layers. What several layers share goes only with the last of them."""

from __future__ import annotations

from typing import TypedDict

from gradpruner.errors import UnsupportedModel
from gradpruner.model.decoder import Decoder, base_shapes
from gradpruner.model.empty_model import build_empty
from gradpruner.model.layer_config import cut_config


class ParameterCounts(TypedDict):
    """What `gradpruner.plan.select` and an `Igia` are told of a model's parameters, adapters not counted.

    layer_parameters: for each layer, the parameters that go with it whatever else goes. shared_parameters: sets of
    layers, with the number of parameters that go when all of the set go. total_parameters: of the whole model, tied
    ones once.
    """

    layer_parameters: tuple[int, ...]
    shared_parameters: tuple[tuple[tuple[int, ...], int], ...]
    total_parameters: int


def count_parameters(decoder: Decoder) -> ParameterCounts:
    """Count what belongs to one decoder layer, to several, and to the model. Changes nothing."""
    head, sizes, holders = f"{decoder.path}.", dict[int, int](), dict[int, set[int | None]]()
    for name, parameter, shape in base_shapes(decoder.base):
        layer = int(name.removeprefix(head).partition(".")[0]) if name.startswith(head) else None
        sizes[id(parameter)] = shape.numel()
        holders.setdefault(id(parameter), set()).add(layer)
    own = [_beside(decoder)] * len(decoder.layers)
    shared: dict[tuple[int, ...], int] = {}
    for parameter_id, found in holders.items():
        layers = tuple(sorted(layer for layer in found if layer is not None))
        if None in found:
            continue  # something outside the layers needs it too
        if len(layers) == 1:
            own[layers[0]] += sizes[parameter_id]
        else:
            shared[layers] = shared.get(layers, 0) + sizes[parameter_id]
    return {
        "layer_parameters": tuple(own),
        "shared_parameters": tuple(sorted(shared.items())),
        "total_parameters": sum(sizes.values()),
    }


def _beside(decoder: Decoder) -> int:
    """How many parameters outside the layers go with each layer: its part of Gemma 3n's embeddings, say.

    A model without its last layers tells: it is built without values from the configuration that a cut would write.
    """
    count = len(decoder.layers)
    if not hasattr(decoder.config, "get_text_config"):
        return 0
    head = f"{decoder.path}."
    before = {name: shape.numel() for name, _, shape in base_shapes(decoder.base) if not name.startswith(head)}
    for kept in range(count - 1, 0, -1):  # not every number of layers is accepted by every configuration
        try:
            small = build_empty(type(decoder.base), cut_config(decoder.config, tuple(range(kept)), count))
        except UnsupportedModel:
            continue
        lost = [before[name] - shape.numel() for name, _, shape in base_shapes(small) if name in before]
        return sum(lost) // (count - kept)
    return 0
