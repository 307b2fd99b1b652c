"""A 2:4 model on torch's semi-structured tensors: what its zeros are good for on a GPU."""

from __future__ import annotations

import torch
from torch import nn
from torch.sparse import to_sparse_semi_structured

from gradpruner.errors import InvalidArgument, UnsupportedModel
from gradpruner.model.decoder import Decoder, linear_modules
from gradpruner.sparsity.checks import prunable


@torch.no_grad()
def to_semi_structured_(model: nn.Module) -> list[str]:
    """Store the linears of all decoder layers as torch's 2:4 tensors, in place; the weights' names.

    model: plain, pruned with pattern 2:4, on a CUDA device, of a dtype and of shapes that torch's tensors know. It is
    then for inference: such weights neither train nor are they saved; save the model before. Nothing is changed unless
    all of them can be. Raises InvalidArgument if a weight is not 2:4, UnsupportedModel where torch has no such tensor.
    """
    decoder = Decoder(model)
    weights = prunable(decoder)
    for weight in weights:
        path, stored = decoder.path_of(weight), decoder.parameter(weight)
        if weight.transposed:
            raise UnsupportedModel(f"{path} is stored as (in, out); torch's semi-structured tensors are (out, in)")
        if stored.shape[1] % 4 or bool((stored.reshape(-1, 4).count_nonzero(1) > 2).any()):
            raise InvalidArgument(f"{path} is not 2:4; expected a model pruned with pattern 2:4")
    found = []
    for weight in weights:
        try:
            tensor = to_sparse_semi_structured(decoder.parameter(weight).data)
        except RuntimeError as error:  # the device, the dtype or the shape; torch says which
            raise UnsupportedModel(f"{decoder.path_of(weight)}: {error}") from error
        found.append((linear_modules(decoder, weight.layer)[weight.name], tensor))
    for module, tensor in found:
        module.weight = nn.Parameter(tensor, requires_grad=False)
    return [decoder.path_of(weight) for weight in weights]
