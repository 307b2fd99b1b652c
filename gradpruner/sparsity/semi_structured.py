"""Store a 2:4 model in torch's semi-structured tensors, to save time on a GPU."""

from __future__ import annotations

import torch
from torch import nn
from torch.sparse import to_sparse_semi_structured

from gradpruner.errors import InvalidArgument, UnsupportedModel
from gradpruner.model.decoder import Decoder, linear_modules
from gradpruner.sparsity.checks import prunable_weights


@torch.no_grad()
def to_semi_structured_(model: nn.Module) -> list[str]:
    """Store the linears of all decoder layers as torch's 2:4 tensors, in place.

    The model is for inference afterwards: such weights can neither be trained nor saved. Save the model before.
    If one weight cannot be stored in this way, nothing is changed.

    Args:
        model: a plain model that was pruned with pattern "2:4", on a CUDA device, with a dtype and shapes that torch's
            semi-structured tensors support.

    Returns:
        The paths of the weights.

    Raises:
        InvalidArgument: a weight is not 2:4, or the model has adapters.
        UnsupportedModel: torch has no such tensor for the device, dtype or shape, or a weight is stored as (in, out).
    """
    decoder = Decoder(model)
    weights = prunable_weights(decoder)
    for weight in weights:
        path, stored = decoder.path_of(weight), decoder.parameter(weight)
        if weight.transposed:
            raise UnsupportedModel(f"{path} is stored as (in, out); torch's semi-structured tensors are (out, in)")
        if stored.shape[1] % 4 or bool((stored.reshape(-1, 4).count_nonzero(1) > 2).any()):
            raise InvalidArgument(f"{path} is not 2:4; expected a model pruned with pattern 2:4")
    converted = []
    for weight in weights:
        try:
            tensor = to_sparse_semi_structured(decoder.parameter(weight).data)
        except RuntimeError as error:  # torch says whether it is the device, the dtype or the shape
            raise UnsupportedModel(f"{decoder.path_of(weight)}: {error}") from error
        converted.append((linear_modules(decoder, weight.layer)[weight.name], tensor))
    for module, tensor in converted:
        module.weight = nn.Parameter(tensor, requires_grad=False)
    return [decoder.path_of(weight) for weight in weights]
