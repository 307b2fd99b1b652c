"""Method "shortgpt": remove the layers that change their input least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import cosine_similarity

from gradpruner.methods.base import Clues, Dropping, register
from gradpruner.model.decoder import Decoder
from gradpruner.model.hidden_states import watch


@register
@dataclass(frozen=True)
class ShortGpt(Dropping):
    """Remove the layers with the smallest Block Influence.

    Args:
        patch: whether gaps are patched, see `Dropping`. Default False.
        adapters: "keep" or "discard", see `Dropping`. Default "discard".
        rank_factor: see `Dropping`. Default 1.

    Source: docs/method.md, section 7 (Men et al. 2024, ShortGPT).
    """

    name: ClassVar[str] = "shortgpt"

    def scores(self, clues: Clues) -> Sequence[float]:
        """Compute the Block Influence of every layer: 1 - mean of cos(x, y).

        x enters the layer and y leaves it. The mean is taken over all tokens of all batches that are not padding.

        Args:
            clues: the model, and the batches to run it on. Labels are ignored.

        Returns:
            One number from 0 to 2 per layer.

        Raises:
            InvalidArgument: there are no batches.
            UnsupportedModel: hidden states are not one vector per token, or the model is an encoder-decoder.
        """
        decoder = Decoder(clues.model)
        cosines, tokens = [0.0] * len(decoder.layers), [0] * len(decoder.layers)

        def add_cosines(layer: int, entering: Tensor, leaving: Tensor, real: Tensor) -> None:
            # padding is left out, not multiplied by 0: hidden states there may be NaN
            cosine = cosine_similarity(entering[real].float(), leaving[real].float(), dim=-1)
            cosines[layer] += float(cosine.cpu().double().sum())
            tokens[layer] += len(cosine)

        watch(decoder, clues.batches, add_cosines)
        return [1 - total / count for total, count in zip(cosines, tokens, strict=True)]
