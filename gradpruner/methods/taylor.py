"""Method "taylor": remove the layers that the loss depends on least, to first order."""

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
from gradpruner.model.modes import evaluating, keeping_grad_flags


@register
@dataclass(frozen=True)
class Taylor(Dropping):
    """Remove the layers with the smallest first-order importance.

    Args:
        patch: whether gaps are patched, see `Dropping`. Default False.
        adapters: "keep" or "discard", see `Dropping`. Default "discard".
        rank_factor: see `Dropping`. Default 1.

    Source: Kim et al. 2024, Shortened LLaMA, its criterion Taylor.
    """

    name: ClassVar[str] = "taylor"

    def scores(self, clues: Clues) -> Sequence[float]:
        """Sum |w · g| over the linear weights of each layer.

        g is the gradient of the mean loss of the batches. The method needs memory for one gradient of all these
        weights, in their own dtype. Gradients that were there before are put back.

        Args:
            clues: the model, and batches with labels.

        Returns:
            One sum per layer.

        Raises:
            InvalidArgument: there are no batches, or they have no labels.
            UnsupportedModel: weights are quantised, or no weight of a layer gets a gradient.
        """
        decoder = Decoder(clues.model)
        layers = linear_parameters(decoder)
        scored = {id(weight) for weights in layers for weight in weights}
        gradients = [(parameter, parameter.grad) for parameter in decoder.base.parameters()]
        try:
            with keeping_grad_flags(decoder.base), evaluating(decoder.base), torch.enable_grad():
                for parameter in decoder.base.parameters():
                    parameter.grad = None
                    parameter.requires_grad_(id(parameter) in scored)
                for inputs in batches_on_device(decoder, clues.batches, "batches"):
                    loss = decoder.base(**inputs, use_cache=False).loss
                    if loss is None:
                        raise InvalidArgument("batches: the model returned no loss; expected batches with labels")
                    (loss / len(clues.batches)).backward()
            without = [j for j, weights in enumerate(layers) if all(weight.grad is None for weight in weights)]
            if without:  # an empty sum is 0, which would remove them first
                raise UnsupportedModel(f"layers {without} got no gradient from any batch: they cannot be scored by it")
            return [sum(map(_importance, weights)) for weights in layers]
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient


def _importance(weight: nn.Parameter) -> float:
    if weight.grad is None:  # for example, an expert that no token was sent to
        return 0.0
    wide = torch.promote_types(weight.dtype, torch.float32)  # a product of two bfloat16 loses half its digits
    products = weight.detach().to(wide) * weight.grad.to(wide)
    return float(products.abs_().cpu().sum(dtype=torch.float64))
