"""Detect a training run that failed although every loss was finite: its loss rose."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

RISE, NATS = 2.0, 0.5  # both must be exceeded: near zero, twice the loss is noise
MOST = 20  # steps at either end


def ends(losses: Sequence[float]) -> tuple[float, float]:
    """Return the mean losses of the first and of the last fifth of the steps, at most 20."""
    steps = max(1, min(MOST, len(losses) // 5))
    return statistics.fmean(losses[:steps]), statistics.fmean(losses[-steps:])


def has_diverged(losses: Sequence[float]) -> bool:
    """Return whether the loss at the end is far above the loss at the start.

    That is more than twice as high, and more than 0.5 nats higher. See `ends` for what start and end are.
    """
    if not losses:
        return False
    start, end = ends(losses)
    return end > RISE * start and end > start + NATS


def explained(what: str, losses: Sequence[float]) -> str:
    """Return a message about a run that has diverged, with what to try.

    Args:
        what: the run, as the message names it.
        losses: training loss of each step.
    """
    start, end = ends(losses)
    return (
        f"{what} has diverged: its loss rose from {start:.3g} to {end:.3g}, more than {RISE:g} times. Its model is not "
        "usable; try a lower learning rate (--lr), a larger batch, or dtype float32"
    )


def why_failed(what: str, losses: Sequence[float], perplexity: float | None) -> str | None:
    """Return why a run is no success, or None if it is one.

    Args:
        what: the run, as the message names it.
        losses: training loss of each step.
        perplexity: of the trained model. None if it was not measured.
    """
    if has_diverged(losses):
        return explained(what, losses)
    if perplexity is not None and not math.isfinite(perplexity):
        return f"{what} has failed: its model's perplexity is {perplexity}. Try a lower learning rate, or dtype float32"
    return None
