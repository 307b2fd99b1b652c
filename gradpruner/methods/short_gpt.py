"""shortgpt: the layers that turn their input least go."""

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
    """Remove the layers of least Block Influence (source: Men et al. 2024, ShortGPT)."""

    name: ClassVar[str] = "shortgpt"

    def scores(self, clues: Clues) -> Sequence[float]:
        """1 - the mean cosine of what enters and what leaves a layer, over all real tokens of all batches.

        Raises InvalidArgument without batches, UnsupportedModel where hidden states are not one vector a token.
        """
        decoder = Decoder(clues.model)
        cosines, tokens = [0.0] * len(decoder.layers), [0] * len(decoder.layers)

        def seen(layer: int, entering: Tensor, leaving: Tensor, real: Tensor) -> None:
            # padding is left out first, not weighted with 0: what is there may be NaN
            cosine = cosine_similarity(entering[real].float(), leaving[real].float(), dim=-1)
            cosines[layer] += float(cosine.cpu().double().sum())
            tokens[layer] += len(cosine)

        watch(decoder, clues.batches, seen)
        return [1 - total / count for total, count in zip(cosines, tokens, strict=True)]
