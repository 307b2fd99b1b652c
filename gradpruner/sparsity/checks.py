"""Checks of batches, options and weights before any weight is zeroed."""

from __future__ import annotations

from collections.abc import Sequence

from gradpruner.distributed.sharding import is_sharded
from gradpruner.errors import InvalidArgument, UnsupportedModel
from gradpruner.model.decoder import Decoder, Weight, base_name, is_packed
from gradpruner.model.hidden_states import Batch
from gradpruner.model.wrappers import is_peft


def check_batches(batches: Sequence[Batch], needed_by: str) -> None:
    """Check that there are batches, and that every token in them is text.

    Args:
        batches: keyword arguments of the model, with input_ids and perhaps attention_mask.
        needed_by: what needs them, for the message.

    Raises:
        InvalidArgument: there are no batches, or some tokens are padding.
    """
    if not batches:
        raise InvalidArgument(f"batches is empty; {needed_by} expected at least one, with input_ids")
    if any("attention_mask" in batch and not bool(batch["attention_mask"].all()) for batch in batches):
        raise InvalidArgument("batches: some tokens are padding, which would count as text; expected full rows")


def check_norm(p: object) -> None:
    """Check that p, the norm over samples, is 1 or 2. Raises InvalidArgument."""
    if p not in (1, 2) or isinstance(p, bool):
        raise InvalidArgument(f"p = {p!r}; accepted are 1 and 2, the norm over samples")


def prunable_weights(decoder: Decoder) -> list[Weight]:
    """Find the weights that can be zeroed: the linears of all decoder layers.

    Args:
        decoder: the layers of the model.

    Returns:
        All of their weights, in the order of the layers.

    Raises:
        InvalidArgument: the model has adapters.
        UnsupportedModel: the layers hold no linear, or one whose weight is quantised, sharded, or holds several
            experts.
    """
    if is_peft(decoder.given) or any(base_name(name) is None for name, _ in decoder.base.named_parameters()):
        raise InvalidArgument("model has adapters; expected a plain model (merge_and_unload first)")
    weights = decoder.weights
    if not weights:
        raise UnsupportedModel("the decoder layers hold no linear weight of their own")
    for weight in weights:
        path, parameter = decoder.path_of(weight), decoder.parameter(weight)
        if len(weight.shape) != 2:
            raise UnsupportedModel(
                f"{path} holds {weight.shape[0]} experts in one tensor: their inputs cannot be recorded one by one"
            )
        if is_packed(parameter) or is_sharded(parameter):
            raise UnsupportedModel(f"{path} is quantised or sharded: it cannot be pruned in place")
    return weights
