"""loss: one layer after the other goes, each time the one without which held-out loss is lowest."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradpruner.data import IGNORED
from gradpruner.decoder import Decoder
from gradpruner.errors import InvalidArgument
from gradpruner.evaluate import _cross_entropy_sum
from gradpruner.logits import evaluating
from gradpruner.methods.base import Clues, Dropping, check_count, lowest, register
from gradpruner.methods.hidden import moved, real, skipping
from gradpruner.plan import Plan


@register
@dataclass(frozen=True)
class HeldOutLoss(Dropping):
    """Remove layers greedily by held-out loss: about layers x count passes over the held-out batches.

    Source: Song et al. 2024, SLEB, with the loss of the task's own answers.
    """

    name: ClassVar[str] = "loss"

    def plan(self, clues: Clues, count: int) -> Plan:
        """Which `count` layers go; of equals those further back.

        Raises InvalidArgument, also without held-out batches or labels in them, UnsupportedModel.
        """
        decoder = Decoder(clues.model)
        check_count(decoder, count)
        removed: list[int] = []
        while len(removed) < count:
            losses: dict[int, float] = {}
            for layer in set(range(len(decoder.layers))) - set(removed):
                with skipping(decoder, [*removed, layer]):
                    losses[layer] = held_out_loss(decoder, clues)
            removed.append(min(losses, key=lambda j: (losses[j], -j)))
        return lowest(decoder, [float(j not in removed) for j in range(len(decoder.layers))], count)


def held_out_loss(decoder: Decoder, clues: Clues) -> float:
    """Mean cross entropy of all labelled tokens of the held-out batches; infinite where it is not finite.

    Raises InvalidArgument if there are no such tokens, UnsupportedModel for an encoder-decoder.
    """
    total, tokens = 0.0, 0
    some = "logits_to_keep" in inspect.signature(decoder.base.forward).parameters
    for inputs in moved(decoder, clues.held_out, "held_out"):
        real(decoder, inputs)
        if "labels" not in inputs:
            raise InvalidArgument("held_out: a batch has no labels")
        labels: Tensor = inputs.pop("labels")[:, 1:]  # the logits at one position predict the next token
        positions = (labels != IGNORED).any(0).nonzero().flatten()
        with evaluating(decoder.base):
            if some:  # the head is a large part of a small model, and answers are short
                logits = decoder.base(**inputs, use_cache=False, logits_to_keep=positions).logits
            else:
                logits = decoder.base(**inputs, use_cache=False).logits[:, positions]
        labels = labels[:, positions]
        total += _cross_entropy_sum(logits.flatten(0, 1), labels.flatten())
        tokens += int((labels != IGNORED).sum())
    if not tokens:
        raise InvalidArgument("held_out: no token has a label; expected answers to predict")
    return total / tokens if math.isfinite(total) else math.inf
