"""taylor: the layers whose weights the loss depends on least, to first order, go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from gradpruner.errors import InvalidArgument, UnsupportedModel
from gradpruner.methods.base import Clues, Dropping, register
from gradpruner.methods.magnitude import linear_parameters
from gradpruner.model.decoder import Decoder
from gradpruner.model.hidden_states import batches_on_device
from gradpruner.model.modes import evaluating


@register
@dataclass(frozen=True)
class Taylor(Dropping):
    """Remove the layers of least first-order importance (source: Kim et al. 2024, Shortened LLaMA, Taylor)."""

    name: ClassVar[str] = "taylor"

    def scores(self, clues: Clues) -> Sequence[float]:
        """The sum of |w g| over a layer's linear weights, g the gradient of the mean of the batches' losses.

        Needs the memory of one gradient of these weights, in their own dtype. Raises InvalidArgument without batches
        or labels, UnsupportedModel if weights are packed by a quantiser, or a layer has none that gets a gradient.
        """
        decoder = Decoder(clues.model)
        layers = linear_parameters(decoder)
        wanted = {id(weight) for weights in layers for weight in weights}
        before = [(p, p.requires_grad, p.grad) for p in decoder.base.parameters()]
        try:
            for parameter, _, _ in before:
                parameter.grad = None
                parameter.requires_grad_(id(parameter) in wanted)
            with evaluating(decoder.base), torch.enable_grad():
                for inputs in batches_on_device(decoder, clues.batches, "batches"):
                    loss = decoder.base(**inputs, use_cache=False).loss
                    if loss is None:
                        raise InvalidArgument("batches: the model returned no loss; expected batches with labels")
                    (loss / len(clues.batches)).backward()
            unseen = [j for j, weights in enumerate(layers) if all(weight.grad is None for weight in weights)]
            if unseen:  # a sum of nothing would make them the first to go
                raise UnsupportedModel(f"layers {unseen} got no gradient from any batch: they cannot be scored by it")
            return [sum(map(_importance, weights)) for weights in layers]
        finally:
            for parameter, flag, gradient in before:
                parameter.requires_grad_(flag)
                parameter.grad = gradient


def _importance(weight: nn.Parameter) -> float:
    if weight.grad is None:  # of an expert that no token was sent to, say
        return 0.0
    wide = torch.promote_types(weight.dtype, torch.float32)  # products of two bfloat16 would lose half their digits
    products = weight.detach().to(wide) * weight.grad.to(wide)
    return float(products.abs_().cpu().sum(dtype=torch.float64))
