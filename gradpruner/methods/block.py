"""Method "block": remove the consecutive layers that together change their input least."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gradpruner.methods.base import Clues, Dropping, check_count, plan_lowest, register
from gradpruner.model.decoder import Decoder
from gradpruner.model.hidden_states import watch
from gradpruner.plan import Plan


@register
@dataclass(frozen=True)
class Block(Dropping):
    """Remove the consecutive layers with the smallest angular distance.

    The distance of a block of layers is the angle between what enters its first and what leaves its last layer,
    see `distances`.

    Args:
        patch: whether gaps are patched, see `Dropping`. Default False.
        adapters: "keep" or "discard", see `Dropping`. Default "discard".
        rank_factor: see `Dropping`. Default 1.

    Source: Gromov et al. 2024, The Unreasonable Ineffectiveness of the Deeper Layers; its similarity-informed variant.
    """

    name: ClassVar[str] = "block"

    def plan(self, clues: Clues, count: int) -> Plan:
        """Choose the block with the smallest distance.

        Of equal blocks, the one further back is removed.

        Args:
            clues: the model, and the batches to run it on. Labels are ignored.
            count: how many consecutive layers are removed.

        Returns:
            A plan that drops one block.

        Raises:
            InvalidArgument: so many layers cannot be removed, or there are no batches.
            UnsupportedModel: hidden states are not one vector per token, or the model is an encoder-decoder.
        """
        decoder = Decoder(clues.model)
        check_count(decoder, count)
        angles = distances(decoder, clues, count)
        first = min(range(len(angles)), key=lambda j: (angles[j], -j))
        block = range(first, first + count)
        return plan_lowest(decoder, [float(j not in block) for j in range(len(decoder.layers))], count)


def distances(decoder: Decoder, clues: Clues, count: int) -> list[float]:
    """Measure the angular distance of every block of `count` layers.

    The distance of the block that begins with layer l is the mean over sequences of arccos(cos(x, y)) / pi. x is the
    hidden state that enters layer l, y the one that leaves layer l + count - 1, both at the last token that is not
    padding.

    Args:
        decoder: the layers of the model.
        clues: `clues.batches` are run through the model.
        count: layers per block.

    Returns:
        One distance from 0 to 1 for each first layer, ascending: layers - count + 1 of them.

    Raises:
        InvalidArgument: there are no batches.
        UnsupportedModel: hidden states are not one vector per token, or the model is an encoder-decoder.
    """
    blocks = len(decoder.layers) - count + 1
    angles, sequences = [0.0] * blocks, [0] * blocks
    entered: dict[int, Tensor] = {}

    def add_angles(layer: int, entering: Tensor, leaving: Tensor, real: Tensor) -> None:
        # the last real token of each row; padding may be on either side
        last = (real * torch.arange(1, real.shape[1] + 1, device=real.device)).argmax(1)
        rows = torch.arange(len(last), device=real.device)
        # in float64: near 1, the arc cosine turns an error of 1e-7 into one of 4e-4
        entered[layer] = entering[rows, last].cpu().double()
        first = layer - count + 1
        if first >= 0:
            cosine = cosine_similarity(entered.pop(first), leaving[rows, last].cpu().double(), dim=-1)
            angles[first] += float(cosine.clamp(-1, 1).arccos().sum())
            sequences[first] += len(last)

    watch(decoder, clues.batches, add_angles)
    return [total / math.pi / n for total, n in zip(angles, sequences, strict=True)]
