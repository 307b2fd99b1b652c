"""block: consecutive layers go, those that together turn their input least."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gradpruner.methods.base import Clues, Dropping, check_count, lowest, register
from gradpruner.model.decoder import Decoder
from gradpruner.model.hidden_states import watch
from gradpruner.plan import Plan


@register
@dataclass(frozen=True)
class Block(Dropping):
    """Remove the block of layers of least angular distance.

    Source: Gromov et al. 2024, The Unreasonable Ineffectiveness of the Deeper Layers; its similarity-informed variant.
    """

    name: ClassVar[str] = "block"

    def plan(self, clues: Clues, count: int) -> Plan:
        """The `count` consecutive layers of least distance; of equals those further back.

        Raises InvalidArgument, also without batches, and UnsupportedModel as `distances` does.
        """
        decoder = Decoder(clues.model)
        check_count(decoder, count)
        found = distances(decoder, clues, count)
        first = min(range(len(found)), key=lambda j: (found[j], -j))
        inside = range(first, first + count)
        return lowest(decoder, [float(j not in inside) for j in range(len(decoder.layers))], count)


def distances(decoder: Decoder, clues: Clues, count: int) -> list[float]:
    """For each first layer l: the mean over sequences of arccos(cos(x, y)) / pi, at the last real token.

    x enters layer l, y leaves layer l + count - 1. Raises InvalidArgument without batches, UnsupportedModel where
    hidden states are not one vector a token.
    """
    blocks = len(decoder.layers) - count + 1
    angles, sequences = [0.0] * blocks, [0] * blocks
    entered: dict[int, Tensor] = {}

    def seen(layer: int, entering: Tensor, leaving: Tensor, real: Tensor) -> None:
        last = (real * torch.arange(1, real.shape[1] + 1, device=real.device)).argmax(1)
        rows = torch.arange(len(last), device=real.device)  # padding may be on either side
        # the arc cosine near 1 turns an error of 1e-7 into one of 4e-4
        entered[layer] = entering[rows, last].cpu().double()
        first = layer - count + 1
        if first >= 0:
            cosine = cosine_similarity(entered.pop(first), leaving[rows, last].cpu().double(), dim=-1)
            angles[first] += float(cosine.clamp(-1, 1).arccos().sum())
            sequences[first] += len(last)

    watch(decoder, clues.batches, seen)
    return [total / math.pi / n for total, n in zip(angles, sequences, strict=True)]
