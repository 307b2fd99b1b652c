"""The tables of a comparison's report, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradpruner.compare.analysis import (
    DENSE,
    METRICS,
    Comparison,
    Metric,
    Spread,
    cost_shares,
    near_paper,
    percent,
    share_text,
    signed,
    spread,
)
from gradpruner.compare.results import Cost
from gradpruner.report.pages import escaped


@dataclass(frozen=True)
class Table:
    """Cells that are HTML already, the first of a row its header; `ours` is the row to stress, by its header."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    ours: str | None = None

    def html(self) -> str:
        """The table, in a frame of its own that scrolls where the page is narrow."""
        sides = ["", *[' class="number"'] * (len(self.columns) - 1)]
        head = "".join(f'<th scope="col"{side}>{name}</th>' for name, side in zip(self.columns, sides, strict=True))
        lines = []
        for name, *cells in self.rows:
            stress = ' class="ours"' if name == self.ours else ""
            values = "".join(f'<td class="number">{cell}</td>' for cell in cells)
            lines.append(f'<tr{stress}><th scope="row">{name}</th>{values}</tr>\n')
        table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(lines)}</tbody></table>"
        return f'<div class="scroll" role="region" aria-label="Table" tabindex="0">{table}</div>\n'


def main_table(comparison: Comparison) -> str:
    """The dense model and every method at the main number of removed layers, the best first."""
    names = comparison.best_first()
    dense = [DENSE] if comparison.at(DENSE) else []
    listed = [*dense, *names]
    metrics = [metric for metric in METRICS if any(comparison.spread(name, metric=metric) for name in listed)]
    judged = any(comparison.difference(name) for name in names)
    columns = ["method", *(escaped(metric.name) for metric in metrics)]
    columns += ["relative<br>to dense"] * bool(dense)
    columns += [f"{escaped(comparison.default)} minus it in exact match<br>[95 % interval]"] * judged
    columns += ["seeds", "whole run"]
    rows = []
    for name in listed:
        row = [escaped(name)]
        for metric in metrics:
            row.append(_mean(comparison.spread(name, metric=metric), metric, metric == comparison.metric))
        if dense:
            change = comparison.relative(name)
            row.append("" if name == DENSE or change is None else percent(change))
        if judged:
            row.append(_difference(comparison, name))
        seconds = spread(run.seconds for run in comparison.at(name))
        rows.append([*row, str(len(comparison.at(name))), duration(seconds.mean) if seconds else ""])
    notes = ["± is the standard deviation over the seeds."] * any(len(comparison.at(name)) > 1 for name in listed)
    if judged:
        notes.append(
            f"Ahead: {comparison.default} scores higher, and the 95 % interval of the paired difference excludes zero. "
            "Behind: lower, likewise. Level: the interval holds zero, so these examples do not tell the two apart. "
            "Each interval is for its own comparison alone."
        )
    if dense:
        notes.append(f"Relative to dense: in {comparison.metric.name}, with the same seeds.")
    notes.append("Whole run: probe, choice, cut and training, without scoring, beside what else the machine did.")
    table = Table(columns, rows, escaped(comparison.default))
    return f'{table.html()}<p class="note">{escaped(" ".join(notes))}</p>\n'


def counts_table(comparison: Comparison) -> str:
    """What the accuracy plot shows, as numbers, folded away; "" where the main table has them all."""
    counts = sorted({count for name in comparison.methods for count in comparison.counts(name)})
    if len(counts) < 2:
        return ""
    metric = comparison.metric
    rows = [
        [escaped(name), *(_mean(comparison.spread(name, count), metric) for count in counts)]
        for name in comparison.methods
    ]
    columns = ["method", *(f"{count} removed<br>{share_text(comparison.ratio(count))}" for count in counts)]
    title = f"{metric.name.capitalize()} at every number of removed layers"
    return _folded(title, Table(columns, rows, escaped(comparison.default)))


def losses_table(comparison: Comparison) -> str:
    """Where each training loss started and ended, folded away."""
    rows = []
    for name in (DENSE, *comparison.methods):
        runs = comparison.at(name)
        first, last = spread(run.first_loss for run in runs), spread(run.last_loss for run in runs)
        if first and last:
            rows.append([escaped(name), f"{first.mean:.3f}", f"{last.mean:.3f}", str(runs[0].steps)])
    columns = ["method", "first 10 steps<br>after the cut", "last 20 steps", "steps in all"]
    return _folded("Training losses as numbers", Table(columns, rows, escaped(comparison.default)))


def costs_table(comparison: Comparison, costs: Sequence[Cost]) -> str:
    """What was measured of the dense and the main model, and every model's share of the dense one's costs."""
    by_count = {cost.count: cost for cost in costs}
    shares = {count: cost_shares(costs, count) for count in sorted(by_count) if count}
    paper = near_paper(comparison)
    columns = ["", "dense", f"{comparison.main} removed", *(f"{count} removed<br>of dense" for count in shares)]
    columns += ["the paper<br>of dense"] * paper
    rows = []
    for measure in shares[comparison.main]:
        amounts = [_amount(getattr(by_count[count], measure.field), measure.unit) for count in (0, comparison.main)]
        parts = [f"{of_count[measure]:.3f}" for of_count in shares.values()]
        reported = "" if measure.paper is None else f"{measure.paper:.3f}"
        rows.append([measure.name, *amounts, *parts, *[reported] * paper])
    note = (
        "The paper's figures: Llama-3.1-8B with 40 % of the layers removed, on the paper's hardware." if paper else ""
    )
    return f'{Table(columns, rows).html()}<p class="note">{escaped(note)}</p>\n'


def quantity(value: float, unit: str) -> str:
    """With the prefix that leaves one to three digits before the point."""
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    while abs(value) >= 999.5 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    return f"{value:.3g} {prefixes[0]}{unit}".rstrip()


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as a person says it."""
    if seconds < 99.5:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{seconds / 60:.1f} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _folded(title: str, table: Table) -> str:
    return f"<details><summary>{escaped(title)}</summary>\n{table.html()}</details>\n"


def _difference(comparison: Comparison, name: str) -> str:
    found = comparison.difference(name)
    if found is None or name in (DENSE, comparison.default):
        return ""
    numbers = f"{signed(found.difference, 3)} [{signed(found.low, 3)}, {signed(found.high, 3)}]"
    return f'<span class="tag {found.standing}">{found.standing}</span> {numbers}'


def _mean(found: Spread | None, metric: Metric, with_deviation: bool = True) -> str:
    if found is None:
        return ""
    deviation = f" ± {metric.shown(found.deviation)}" if with_deviation and found.deviation is not None else ""
    return f"{metric.shown(found.mean)}{deviation}"


def _amount(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 else f"{value * 1000:.3g} ms"
    return quantity(value, unit)
