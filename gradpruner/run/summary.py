"""What a run found, for people: one sentence, one table and the notes beside it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from gradpruner.plan import Plan
from gradpruner.report.numbers import percent

TURNS = "tokens_per_second_turns"  # one number per turn, see `speeds_in_turns`
# by the name of a line in `comparison`: the field of a row, the unit it is divided by, its format
MEASURES = {
    "layers": ("layers", 1, "{:.0f}"),
    "parameters (M)": ("parameters", 1e6, "{:.1f}"),
    "exact match": ("exact_match", 1, "{:.3f}"),
    "perplexity": ("perplexity", 1, "{:.3f}"),
    "training step (s)": ("step_seconds", 1, "{:.2f}"),
    "generation (tokens/s)": ("tokens_per_second", 1, "{:.1f}"),
    "peak memory, training (GB)": ("peak_bytes", 1e9, "{:.2f}"),
    "checkpoint (MB)": ("checkpoint_bytes", 1e6, "{:.1f}"),
}
# lines that depend on the machine: a model card leaves them out
OF_THE_MACHINE = ("training step (s)", "generation (tokens/s)", "peak memory, training (GB)")


def outcome(rows: Sequence[Mapping[str, Any]], plan: Plan) -> str:
    """Return the result of a run in one sentence, accuracy first.

    Args:
        rows: the dense model's results and the pruned model's, or the pruned model's alone.
        plan: the plan that the model was pruned by.

    Returns:
        A sentence such as "The pruned model keeps 0.816 of 0.843 exact match (−3.2 %) with 12 of 30 decoder layers
        removed; a training step takes 0.67 of the dense model's time." Exact match decides, or perplexity where no
        answers were scored.
    """
    pruned, dense = rows[-1], rows[0] if len(rows) > 1 else None
    removed = f"with {len(plan.removed)} of {plan.layers} decoder layers removed"
    field, name, style = "exact_match", "exact match", "{:.3f}"
    if pruned[field] is None:
        field, name, style = "perplexity", "perplexity", "{:.2f}"
    if pruned[field] is None:
        return f"The pruned model was not scored, {removed}."
    score = style.format(pruned[field])
    if dense is None or not dense[field]:
        return f"The pruned model reaches {score} {name} {removed}."
    before, change = style.format(dense[field]), percent(pruned[field] / dense[field] - 1)
    if field == "exact_match" and pruned[field] <= dense[field]:
        sentence = f"The pruned model keeps {score} of {before} {name} ({change}) {removed}"
    else:
        sentence = f"The pruned model reaches {score} {name}, the dense model {before} ({change}), {removed}"
    if dense["step_seconds"]:
        share = pruned["step_seconds"] / dense["step_seconds"]
        sentence += f"; a training step takes {share:.2f} of the dense model's time"
    return f"{sentence}."


def comparison(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the results as a table: one line per measure, one column per model.

    Of two models, the last column is pruned over dense. What was measured in turns is a median, with the lowest and the
    highest turn in brackets. Of several test sets, each has its scores below those of all.
    """
    table = []
    for label, (key, unit, style) in MEASURES.items():
        if any(row[key] is None for row in rows):
            continue
        if key == "tokens_per_second" and all(row.get(TURNS) for row in rows):
            table.append({"": label, **_in_turns(rows, style)})
            continue
        names, values = [row["name"] for row in rows], [row[key] / unit for row in rows]
        table.append({"": label, **_line(names, values, style)})
        for found in zip(*(row.get("test_sets", ()) for row in rows), strict=True):  # one test set, of each model
            values = [scores.get(key) for scores in found]
            if None not in values:
                table.append({"": f"{label}: {found[0]['name']}", **_line(names, values, style)})
    return table


def _line(names: Sequence[str], values: Sequence[float], style: str) -> dict[str, str]:
    line = {name: style.format(value) for name, value in zip(names, values, strict=True)}
    if len(values) == 2:
        line["pruned / dense"] = f"{values[1] / values[0]:.1%}" if values[0] else "-"
    return line


def _in_turns(rows: Sequence[Mapping[str, Any]], style: str) -> dict[str, str]:
    line = {row["name"]: spread(row[TURNS], style) for row in rows}
    if len(rows) == 2:  # within each turn: what slows both models down is not in the ratio
        line["pruned / dense"] = spread(_ratios(*rows), "{:.1%}")
    return line


def _ratios(dense: Mapping[str, Any], pruned: Mapping[str, Any]) -> list[float]:
    return [of_pruned / of_dense for of_dense, of_pruned in zip(dense[TURNS], pruned[TURNS], strict=True)]


def share_of_dense(field: str, dense: Mapping[str, Any], pruned: Mapping[str, Any]) -> float | None:
    """Return a figure of the pruned model over that of the dense one, as `comparison` shows it.

    Args:
        field: the figure, such as "step_seconds".
        dense: the results of the dense model.
        pruned: those of the pruned one.

    Returns:
        The share. Of what was measured in turns, the median over the turns. None if a figure is missing.
    """
    if field == "tokens_per_second" and dense.get(TURNS) and pruned.get(TURNS):
        return statistics.median(_ratios(dense, pruned))
    if pruned.get(field) is None or not dense.get(field):
        return None
    return float(pruned[field] / dense[field])


def spread(values: Sequence[float], style: str) -> str:
    """Return the median, with the lowest and the highest value in brackets: "2.0 (1.0 to 3.0)".

    Args:
        values: at least one.
        style: the format of each: "{:.1f}".
    """
    middle, low, high = (style.format(value) for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})"


def notes(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return what must be known to read the table of `comparison` right; "" for one model."""
    sets = _of_sets(rows)
    if len(rows) < 2:
        return " ".join(note for note in (_of_processes(rows), sets) if note)
    turns = rows[0].get(TURNS)
    generation = f"Generation: the models took {len(turns)} turns; median (lowest to highest). " if turns else ""
    return (
        f"{generation}Training step and peak memory were measured in each model's own run. The runs follow each other "
        "in one process: what else the machine did then is in the numbers, and on a CPU memory of the first run can be "
        "in the second run's peak. gradpruner compare measures costs apart and in turns."
        f"{' ' if _of_processes(rows) else ''}{_of_processes(rows)}{' ' if sets else ''}{sets}"
    )


def _of_sets(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say how large the test sets are; "" if there is one."""
    sizes = ", ".join(f"{one['name']} {one['examples']:,}" for one in rows[0].get("test_sets", ()))
    return (
        f"Scores without the name of a test set are of all test examples. Examples of each set: {sizes}."
        if sizes
        else ""
    )


def _of_processes(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say what the figures of several processes are; "" if each model was trained by one."""
    counts = [row.get("training", {}).get("processes", 1) for row in rows]
    if max(counts, default=1) == 1:
        return ""
    several = " and ".join(f"{row['name']} by {count}" for row, count in zip(rows, counts, strict=True))
    return (
        f"Processes that trained together: {several}. Their step is as long as that of the slowest, and their peak "
        "memory is that of the largest process."
    )
