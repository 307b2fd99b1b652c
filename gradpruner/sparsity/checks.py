"""Which weights pruning below the layer is about: the linears of all decoder layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from gradpruner.distributed.sharding import is_sharded
from gradpruner.errors import InvalidArgument, UnsupportedModel
from gradpruner.model.decoder import Decoder, Weight, base_name, is_packed
from gradpruner.model.wrappers import is_peft


def prunable(decoder: Decoder) -> list[Weight]:
    """All linear weights of the decoder layers. Raises InvalidArgument, UnsupportedModel if one cannot be pruned."""
    if is_peft(decoder.given) or any(base_name(name) is None for name, _ in decoder.base.named_parameters()):
        raise InvalidArgument("model has adapters; expected a plain model (merge_and_unload first)")
    found = decoder.weights
    if not found:
        raise UnsupportedModel("the decoder layers hold no linear weight of their own")
    for weight in found:
        path, parameter = decoder.path_of(weight), decoder.parameter(weight)
        if len(weight.shape) != 2:
            raise UnsupportedModel(f"{path} holds {weight.shape[0]} experts in one tensor: their inputs cannot be seen")
        if is_packed(parameter) or is_sharded(parameter):
            raise UnsupportedModel(f"{path} is quantised or sharded: it cannot be pruned in place")
    return found


Batch = Mapping[str, Tensor]


def need_full(batches: Sequence[Batch], who: str) -> None:
    """Raises InvalidArgument, with the name of `who` needs them, without batches or with padding in them."""
    if not batches:
        raise InvalidArgument(f"batches is empty; {who} expected at least one, with input_ids")
    if any("attention_mask" in batch and not bool(batch["attention_mask"].all()) for batch in batches):
        raise InvalidArgument("batches: some tokens are padding, which would count as text; expected full rows")
