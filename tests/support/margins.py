"""The margin at a cut of the lowest layers."""

from __future__ import annotations

from gradpruner.probe.selection import lowest_first, margin


def margin_at(scores, count, protect=(0,)):
    return margin(scores, lowest_first(scores, protect)[:count], protect)
