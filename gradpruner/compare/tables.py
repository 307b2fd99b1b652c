"""The tables of a comparison's page, as rows: see `gradpruner.report.tables`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradpruner.compare.analysis import (
    DENSE,
    METRICS,
    Comparison,
    Metric,
    Spread,
    cost_shares,
    near_paper,
    spread,
)
from gradpruner.compare.results import Cost
from gradpruner.report.numbers import duration, percent, quantity, share_text, signed
from gradpruner.report.tables import Tagged

Row = dict[str, Any]  # a value by the name of its column; a line break in a name is one in the page


def main_rows(comparison: Comparison) -> list[Row]:
    """Return the dense model and every method at the main number, the best first."""
    names = _listed(comparison)
    metrics = [metric for metric in METRICS if any(comparison.spread(name, metric=metric) for name in names)]
    rows = []
    for name in names:
        row: Row = {"method": name}
        for metric in metrics:
            mean = comparison.spread(name, metric=metric)
            row[metric.name] = _mean(mean, metric, with_deviation=metric == comparison.metric)
        if comparison.at(DENSE):
            change = None if name == DENSE else comparison.relative(name)
            row["relative\nto dense"] = "" if change is None else percent(change)
        if _is_judged(comparison):
            row[f"{comparison.default} minus it in exact match\n[95 % interval]"] = _difference(comparison, name)
        row["seeds"] = str(len(comparison.at(name)))
        seconds = spread(run.seconds for run in comparison.at(name))
        row["whole run"] = duration(seconds.mean) if seconds else ""
        rows.append(row)
    return rows


def main_note(comparison: Comparison) -> str:
    """Return what must be known to read the table of `main_rows` right."""
    notes = []
    if any(len(comparison.at(name)) > 1 for name in _listed(comparison)):
        notes.append("± is the standard deviation over the seeds.")
    if _is_judged(comparison):
        notes.append(
            f"Ahead: {comparison.default} scores higher, and the 95 % interval of the paired difference excludes zero. "
            "Behind: lower, likewise. Level: the interval holds zero, so these examples do not tell the two apart. "
            "Each interval is for its own comparison alone."
        )
    if comparison.at(DENSE):
        notes.append(f"Relative to dense: in {comparison.metric.name}, with the same seeds.")
    notes.append("Whole run: probe, choice, cut and training, without scoring, beside what else the machine did.")
    return " ".join(notes)


def count_rows(comparison: Comparison) -> list[Row]:
    """Return every method at every number of removed layers, if there are several."""
    counts = sorted({count for name in comparison.methods for count in comparison.counts(name)})
    if len(counts) < 2:
        return []
    metric, rows = comparison.metric, []
    for name in comparison.methods:
        row: Row = {"method": name}
        for count in counts:
            column = f"{count} removed\n{share_text(comparison.ratio(count))}"
            row[column] = _mean(comparison.spread(name, count), metric)
        rows.append(row)
    return rows


def loss_rows(comparison: Comparison) -> list[Row]:
    """Return where the training loss of each method started and ended."""
    rows: list[Row] = []
    for name in (DENSE, *comparison.methods):
        runs = comparison.at(name)
        first, last = spread(run.first_loss for run in runs), spread(run.last_loss for run in runs)
        if first and last:
            rows.append(
                {
                    "method": name,
                    "first 10 steps\nafter the cut": f"{first.mean:.3f}",
                    "last 20 steps": f"{last.mean:.3f}",
                    "steps in all": str(runs[0].steps),
                }
            )
    return rows


def cost_rows(comparison: Comparison, costs: Sequence[Cost]) -> list[Row]:
    """Return the costs of the dense and the main model, and every model's shares.

    Args:
        comparison: the results.
        costs: what was measured, the dense model and the main one among them.
    """
    by_count = {cost.count: cost for cost in costs}
    shares = {count: cost_shares(costs, count) for count in sorted(by_count) if count}
    rows = []
    for measure in shares[comparison.main]:
        row: Row = {"": measure.name}
        for column, count in (("dense", 0), (f"{comparison.main} removed", comparison.main)):
            row[column] = _amount(getattr(by_count[count], measure.field), measure.unit)
        for count, shares_of_count in shares.items():
            row[f"{count} removed\nof dense"] = f"{shares_of_count[measure]:.3f}"
        if near_paper(comparison):
            row["the paper\nof dense"] = "" if measure.paper is None else f"{measure.paper:.3f}"
        rows.append(row)
    return rows


def cost_note(comparison: Comparison) -> str:
    """Return what must be known to read the table of `cost_rows` right; "" if nothing."""
    if not near_paper(comparison):
        return ""
    return "The paper's figures: Llama-3.1-8B with 40 % of the layers removed, on the paper's hardware."


def _listed(comparison: Comparison) -> list[str]:
    """Return the dense model, if it was run, and the methods that were scored."""
    return [*([DENSE] if comparison.at(DENSE) else []), *comparison.best_first()]


def _is_judged(comparison: Comparison) -> bool:
    return any(comparison.difference(name) for name in comparison.best_first())


def _difference(comparison: Comparison, name: str) -> Tagged | str:
    difference = comparison.difference(name)
    if difference is None or name in (DENSE, comparison.default):
        return ""
    numbers = f"{signed(difference.mean, 3)} [{signed(difference.low, 3)}, {signed(difference.high, 3)}]"
    return Tagged(difference.standing, numbers)


def _mean(scores: Spread | None, metric: Metric, with_deviation: bool = True) -> str:
    if scores is None:
        return ""
    deviation = f" ± {metric.shown(scores.deviation)}" if with_deviation and scores.deviation is not None else ""
    return f"{metric.shown(scores.mean)}{deviation}"


def _amount(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 else f"{value * 1000:.3g} ms"
    return quantity(value, unit)
