"""Method "loss": remove, one by one, the layer that the held-out loss needs least."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from gradpruner.errors import InvalidArgument
from gradpruner.methods.base import Clues, Dropping, check_count, plan_lowest, register
from gradpruner.model.decoder import Decoder
from gradpruner.model.hidden_states import batches_on_device, leave_out, real_tokens, recording, resume_behind, skipping
from gradpruner.model.loss import IGNORED, answer_logits, cross_entropy_sum
from gradpruner.plan import Plan


@register
@dataclass(frozen=True)
class HeldOutLoss(Dropping):
    """Remove layers greedily by the loss on held-out answers.

    In each round, every layer that is left is tried: the one without which the loss is lowest is removed. This takes
    about layers x count forward passes over the held-out batches. Each restarts at the layer that is tried, so about
    half of the work is saved.

    Args:
        patch: whether gaps are patched, see `Dropping`. Default False.
        adapters: "keep" or "discard", see `Dropping`. Default "discard".
        rank_factor: see `Dropping`. Default 1.

    Source: Song et al. 2024, SLEB, with the loss of the task's own answers.
    """

    name: ClassVar[str] = "loss"

    def plan(self, clues: Clues, count: int) -> Plan:
        """Choose the layers in `count` rounds. Of equal losses, the layer further back is removed.

        Args:
            clues: the model, and held-out batches with labels.
            count: how many layers are removed, one per round.

        Returns:
            A plan that drops these layers.

        Raises:
            InvalidArgument: so many layers cannot be removed, or the held-out batches are empty or have no labels.
            UnsupportedModel: the model is an encoder-decoder.
        """
        decoder = Decoder(clues.model)
        check_count(decoder, count)
        removed: list[int] = []
        while len(removed) < count:
            losses = losses_without(decoder, clues, removed)
            removed.append(min(losses, key=lambda j: (losses[j], -j)))
        return plan_lowest(decoder, [float(j not in removed) for j in range(len(decoder.layers))], count)


def losses_without(decoder: Decoder, clues: Clues, removed: Sequence[int]) -> dict[int, float]:
    """Compute the held-out loss without each layer in turn.

    Args:
        decoder: the layers of the model.
        clues: the held-out batches.
        removed: layers that are removed already.

    Returns:
        For each layer that is not in `removed`, the `held_out_loss` of the model without it and without `removed`.

    Raises:
        InvalidArgument: as in `held_out_loss`.
        UnsupportedModel: as in `held_out_loss`.
    """
    candidates = [j for j in range(len(decoder.layers)) if j not in removed]
    totals, tokens = dict.fromkeys(candidates, 0.0), 0
    for inputs in batches_on_device(decoder, clues.held_out, "held_out"):
        real_tokens(decoder, inputs)  # refuses an encoder-decoder
        # what enters a layer does not depend on whether it is removed: compute it once, for all candidates
        entering: dict[int, Any] = {}
        with skipping(decoder, removed), recording(decoder, entering):
            tokens += _cross_entropy(decoder, inputs)[1]
        for j in candidates:
            with leave_out(decoder, removed, entering), resume_behind(decoder, j, entering):
                totals[j] += _cross_entropy(decoder, inputs)[0]
    return {j: _mean(total, tokens) for j, total in totals.items()}


def held_out_loss(decoder: Decoder, clues: Clues) -> float:
    """Compute the mean cross entropy over all labelled tokens of the held-out batches.

    Args:
        decoder: the layers of the model.
        clues: the held-out batches.

    Returns:
        The loss per token, in nats. It is infinite if the sum is not finite.

    Raises:
        InvalidArgument: there are no batches, a batch has no labels, or no token is labelled.
        UnsupportedModel: the model is an encoder-decoder.
    """
    total, tokens = 0.0, 0
    for inputs in batches_on_device(decoder, clues.held_out, "held_out"):
        real_tokens(decoder, inputs)
        loss, counted = _cross_entropy(decoder, inputs)
        total, tokens = total + loss, tokens + counted
    return _mean(total, tokens)


def _mean(total: float, tokens: int) -> float:
    if not tokens:
        raise InvalidArgument("held_out: no token has a label; expected answers to predict")
    return total / tokens if math.isfinite(total) else math.inf


def _cross_entropy(decoder: Decoder, inputs: Mapping[str, Any]) -> tuple[float, int]:
    """The cross entropy summed over the labelled tokens of one batch, and how many these are."""
    if "labels" not in inputs:
        raise InvalidArgument("held_out: a batch has no labels")
    logits, labels = answer_logits(decoder.base, inputs)
    return cross_entropy_sum(logits.flatten(0, 1), labels.flatten()), int((labels != IGNORED).sum())
