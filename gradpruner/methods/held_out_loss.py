"""loss: one layer after the other goes, each time the one without which held-out loss is lowest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from gradpruner.errors import InvalidArgument
from gradpruner.methods.base import Clues, Dropping, check_count, lowest, register
from gradpruner.model.decoder import Decoder
from gradpruner.model.hidden_states import batches_on_device, leave_out, real_tokens, recording, resume_behind, skipping
from gradpruner.model.loss import IGNORED, answer_logits, cross_entropy_sum
from gradpruner.plan import Plan


@register
@dataclass(frozen=True)
class HeldOutLoss(Dropping):
    """Remove layers greedily by held-out loss: layers x count passes over the held-out batches, half of each saved.

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
            losses = losses_without(decoder, clues, removed)
            removed.append(min(losses, key=lambda j: (losses[j], -j)))
        return lowest(decoder, [float(j not in removed) for j in range(len(decoder.layers))], count)


def losses_without(decoder: Decoder, clues: Clues, removed: Sequence[int]) -> dict[int, float]:
    """By layer still there: `held_out_loss` without it and without `removed`. Raises as that does.

    What enters a layer is the same whether it is removed or not: it is computed once, and only what follows is anew.
    """
    candidates = [j for j in range(len(decoder.layers)) if j not in removed]
    totals, tokens = dict.fromkeys(candidates, 0.0), 0
    for inputs in batches_on_device(decoder, clues.held_out, "held_out"):
        real_tokens(decoder, inputs)
        entering: dict[int, Any] = {}
        with skipping(decoder, removed), recording(decoder, entering):
            tokens += _batch(decoder, inputs)[1]
        for j in candidates:
            with leave_out(decoder, removed, entering), resume_behind(decoder, j, entering):
                totals[j] += _batch(decoder, inputs)[0]
    return {j: _mean(total, tokens) for j, total in totals.items()}


def held_out_loss(decoder: Decoder, clues: Clues) -> float:
    """Mean cross entropy of all labelled tokens of the held-out batches; infinite where it is not finite.

    Raises InvalidArgument if there are no such tokens, UnsupportedModel for an encoder-decoder.
    """
    total, tokens = 0.0, 0
    for inputs in batches_on_device(decoder, clues.held_out, "held_out"):
        real_tokens(decoder, inputs)
        loss, counted = _batch(decoder, inputs)
        total, tokens = total + loss, tokens + counted
    return _mean(total, tokens)


def _mean(total: float, tokens: int) -> float:
    if not tokens:
        raise InvalidArgument("held_out: no token has a label; expected answers to predict")
    return total / tokens if math.isfinite(total) else math.inf


def _batch(decoder: Decoder, inputs: Mapping[str, Any]) -> tuple[float, int]:
    """Sum of the cross entropy over the labelled tokens of one batch, and their number."""
    if "labels" not in inputs:
        raise InvalidArgument("held_out: a batch has no labels")
    logits, labels = answer_logits(decoder.base, inputs)
    return cross_entropy_sum(logits.flatten(0, 1), labels.flatten()), int((labels != IGNORED).sum())
