"""The table at the end of a run: the dense and the pruned model, and one over the other."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

TURNS = "tokens_per_second_turns"  # one number per turn, see `speeds_in_turns`
OF_THE_MACHINE = (
    "training step (s)",
    "generation (tokens/s)",
    "peak memory, training (GB)",
)  # as `comparison` has them


def comparison(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Results as a table a person can read: one line a measure, one column a model, and pruned over dense.

    What was measured in turns is a median, with the lowest and the highest turn in brackets.
    """
    shown = {
        "layers": ("layers", 1, "{:.0f}"),
        "parameters (M)": ("parameters", 1e6, "{:.1f}"),
        "exact match": ("exact_match", 1, "{:.3f}"),
        "perplexity": ("perplexity", 1, "{:.3f}"),
        "training step (s)": ("step_seconds", 1, "{:.2f}"),
        "generation (tokens/s)": ("tokens_per_second", 1, "{:.1f}"),
        "peak memory, training (GB)": ("peak_bytes", 1e9, "{:.2f}"),
        "checkpoint (MB)": ("checkpoint_bytes", 1e6, "{:.1f}"),
    }
    table = []
    for label, (key, unit, style) in shown.items():
        if any(row[key] is None for row in rows):
            continue
        if key == "tokens_per_second" and all(row.get(TURNS) for row in rows):
            table.append({"": label, **_in_turns(rows, style)})
            continue
        line: dict[str, Any] = {"": label, **{row["name"]: style.format(row[key] / unit) for row in rows}}
        if len(rows) == 2:
            line["pruned / dense"] = f"{rows[1][key] / rows[0][key]:.1%}" if rows[0][key] else "-"
        table.append(line)
    return table


def _in_turns(rows: Sequence[Mapping[str, Any]], style: str) -> dict[str, str]:
    line = {row["name"]: spread(row[TURNS], style) for row in rows}
    if len(rows) == 2:  # within each turn: what slows both down is not in the ratio
        ratios = [pruned / dense for dense, pruned in zip(rows[0][TURNS], rows[1][TURNS], strict=True)]
        line["pruned / dense"] = spread(ratios, "{:.1%}")
    return line


def spread(values: Sequence[float], style: str) -> str:
    """The median, with the lowest and the highest in brackets."""
    middle, low, high = (style.format(value) for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})"


def notes(rows: Sequence[Mapping[str, Any]]) -> str:
    """What must be known beside the table to read it right; "" for one model."""
    if len(rows) < 2:
        return ""
    turns = rows[0].get(TURNS)
    generation = f"Generation: the models took {len(turns)} turns; median (lowest to highest). " if turns else ""
    return (
        f"{generation}Training step and peak memory: each model in its own run, one run after the "
        "other in one process. What else the machine did then is in them, and on a CPU memory of the first run can be "
        "in the second run's peak. gradpruner compare measures costs apart and in turns."
    )
