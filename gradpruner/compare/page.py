"""The page of a comparison, an HTML file that needs no other, and its plots as PNGs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradpruner.compare.analysis import (
    DENSE,
    EXACT_MATCH,
    Comparison,
    Differences,
    cost_shares,
    headline,
    spread,
)
from gradpruner.compare.choice_plots import plot_layers, plot_sensitivity, plot_settling, settled
from gradpruner.compare.plots import Losses, loss_curves, plot_accuracy, plot_costs, plot_losses
from gradpruner.compare.results import Cost, Result
from gradpruner.compare.tables import cost_note, cost_rows, count_rows, loss_rows, main_note, main_rows
from gradpruner.report.numbers import duration, quantity, share_text
from gradpruner.report.pages import Picture, Tile, base64_png, write_page

PICTURES = ("accuracy.png", "layers.png", "settling.png", "losses.png", "costs.png", "sensitivity.png")


def write_comparison(
    folder: str | os.PathLike[str],
    *,
    title: str,
    task: str,
    results: Sequence[Result],
    losses: Losses,
    costs: Sequence[Cost],
    differences: Differences,
    probe: Mapping[str, Any] | None = None,
    sensitivity: Sequence[Mapping[str, Any]] = (),
    tasks: Sequence[Mapping[str, Any]] = (),
    tasks_note: str = "",
    notes: Sequence[str] = (),
) -> Path:
    """Write report.html and its plots. What there is no data for is left out.

    Args:
        folder: where the page and the plots are written. Plots of an earlier page that this one lacks are removed.
        title: heading of the page.
        task: one line on the model, the data and the number of steps.
        results: one per run.
        losses: of every optimizer step after the cut, by method, number of removed layers and seed.
        costs: the measured costs of the models, one per number of removed layers.
        differences: the default method minus another one, in exact match, by method and number of removed layers.
        probe: what one probe found: "layer_scores" by kind, the "kind" that chose the layers, "stability" (the settled
            share of the removed layers after each probe step) and the "plan".
        sensitivity: rows with factor, value, exact_match, is_default, and dense, the dense model's exact match.
        tasks: rows of the table of tasks, see `gradpruner.compare.task_scores.task_rows`.
        tasks_note: what stands under this table.
        notes: sentences for the end of the page.

    Returns:
        The path of the page.

    Raises:
        InvalidArgument: no pruned model is among the results, a run occurs twice, the folder is missing, the scores
            do not fit the plan, or matplotlib is missing.
        CheckpointError: a file cannot be written.
    """
    plan = probe["plan"] if probe else None
    comparison = Comparison(results, differences, None if plan is None else len(plan.removed))
    pictures = _Pictures(Path(folder), task)
    stability = probe["stability"] if probe else ()
    path = Path(folder) / "report.html"
    content = {
        "title": title,
        "task": task,
        "answer": headline(comparison, costs),
        "figures": _figures(comparison, costs),
        "default": comparison.default,
        "metric": comparison.metric.name,
        "removed": comparison.main,
        "layers": comparison.layers,
        "accuracy": _accuracy(comparison, pictures),
        "several_seeds": any(len(runs) > 1 for runs in comparison.groups.values()),
        "examples": comparison.at(comparison.default)[0].examples,
        "main_rows": main_rows(comparison),
        "main_note": main_note(comparison),
        "count_rows": count_rows(comparison),
        "choice": _choice(comparison, pictures, probe),
        "settling": _settling(pictures, stability),
        "settled": _when_settled(stability),
        "losses": _losses(comparison, pictures, losses),
        "loss_rows": loss_rows(comparison),
        "costs": _costs(comparison, pictures, costs),
        "cost_rows": cost_rows(comparison, costs) if cost_shares(costs, comparison.main) else [],
        "cost_note": cost_note(comparison),
        "sensitivity": _sensitivity(pictures, sensitivity),
        "tasks": tasks,
        "tasks_note": tasks_note,
        "sentences": notes,
    }
    pictures.remove_others()
    write_page(path, "compare/templates/comparison.html", **content)
    return path


class _Pictures:
    """Draws the plots into the folder, and keeps account of which it has drawn."""

    def __init__(self, folder: Path, task: str) -> None:
        self.folder, self.task = folder, task
        self.drawn: set[str] = set()

    def draw(self, name: str, says: str, plot: Callable[[Path, str], None]) -> Picture:
        """Draw one plot and return it for the page.

        `says` is what the plot shows, for those who cannot see it.
        """
        plot(self.folder / name, self.task)
        self.drawn.add(name)
        return Picture(base64_png(self.folder / name), says)

    def remove_others(self) -> None:
        """Remove what an earlier page left here and this one has no data for."""
        for name in PICTURES:
            if name not in self.drawn:
                (self.folder / name).unlink(missing_ok=True)


def _figures(comparison: Comparison, costs: Sequence[Cost]) -> list[Tile]:
    """Return the key figures, accuracy first."""
    metric = comparison.metric
    here, dense = comparison.spread(comparison.default), comparison.spread(DENSE)
    runs, dense_runs = comparison.at(comparison.default), comparison.at(DENSE)
    figures = []
    if here:
        figures.append(Tile(metric.name, metric.shown(here.mean), f"dense {metric.shown(dense.mean)}" if dense else ""))
    left = f"{comparison.layers - comparison.main} of {comparison.layers}"
    figures.append(Tile("decoder layers left", left, f"{share_text(comparison.ratio(comparison.main))} removed"))
    parameters = runs[0].parameters
    share = f"{share_text(parameters / dense_runs[0].parameters)} of dense" if dense_runs else ""
    figures.append(Tile("parameters left", quantity(parameters, ""), share))
    for measure, part in cost_shares(costs, comparison.main).items():
        if measure.paper is not None:  # what people ask for; the others are in the table of costs
            figures.append(Tile(measure.name, f"{part:.2f}", "of dense"))
    seconds, dense_seconds = spread(run.seconds for run in runs), spread(run.seconds for run in dense_runs)
    if seconds and not costs:  # costs are measured alone and in turns; a run's time is also what else ran then
        beside = f"dense {duration(dense_seconds.mean)}" if dense_seconds else ""
        figures.append(Tile("whole run", duration(seconds.mean), beside))
    return figures


def _accuracy(comparison: Comparison, pictures: _Pictures) -> Picture | None:
    metric, names = comparison.metric, comparison.best_first()
    if not names:
        return None
    means = {name: scores.mean for name in (DENSE, *names) if (scores := comparison.spread(name))}
    listed = ", ".join(f"{name} {metric.shown(mean)}" for name, mean in means.items())
    return pictures.draw(
        "accuracy.png",
        f"Line plot of {metric.name} against the share of layers removed, one line per method. "
        f"At {share_text(comparison.ratio(comparison.main))}: {listed}.",
        lambda path, task: plot_accuracy(path, comparison, task),
    )


def _choice(comparison: Comparison, pictures: _Pictures, probe: Mapping[str, Any] | None) -> Picture | None:
    """Return the plot of the layer scores and of the layers that each method removes."""
    plan = probe["plan"] if probe else None
    scores = probe["layer_scores"][probe["kind"]] if probe else ()
    removed = {name: runs[0].removed for name in comparison.methods if (runs := comparison.at(name))}
    removed = {name: layers for name, layers in removed.items() if layers}
    says = []
    if plan is not None:
        says.append(f"Bars of every decoder layer's score, coloured by what becomes of it: the plan {plan.summary()}.")
    if removed:
        listed = "; ".join(f"{name} {layers}" for name, layers in removed.items())
        says.append(f"Grid of methods and layers, filled where a method removes the layer: {listed}.")
    if not says:
        return None
    return pictures.draw(
        "layers.png", " ".join(says), lambda path, task: plot_layers(path, comparison, task, scores, plan)
    )


def _settling(pictures: _Pictures, stability: Sequence[float]) -> Picture | None:
    if not stability:
        return None
    return pictures.draw(
        "settling.png",
        "Line plot of the share of the finally removed layers in the removed set after each probe step. "
        f"{_when_settled(stability)}",
        lambda path, task: plot_settling(path, stability, task),
    )


def _when_settled(stability: Sequence[float]) -> str:
    step = settled(stability)
    when = "never settles" if step is None else f"is the final one from step {step} on"
    return f"Of {len(stability)} probe steps, the removed set {when}."


def _losses(comparison: Comparison, pictures: _Pictures, losses: Losses) -> Picture | None:
    curves = loss_curves(comparison, losses)
    if not curves:
        return None
    ends = ", ".join(f"{name} {curve.values[-1]:.3g}" for name, curve in curves.items())
    return pictures.draw(
        "losses.png",
        f"Line plot of the training loss against optimizer steps. At the last step: {ends}.",
        lambda path, task: plot_losses(path, comparison, losses, task),
    )


def _costs(comparison: Comparison, pictures: _Pictures, costs: Sequence[Cost]) -> Picture | None:
    shares = cost_shares(costs, comparison.main)
    if not shares:
        return None
    listed = ", ".join(f"{measure.name} {share:.2f}" for measure, share in shares.items())
    return pictures.draw(
        "costs.png",
        f"Bars of the cost with {comparison.main} layers removed as a share of the dense model's: {listed}.",
        lambda path, task: plot_costs(path, comparison, costs, task),
    )


def _sensitivity(pictures: _Pictures, rows: Sequence[Mapping[str, Any]]) -> Picture | None:
    scored = [row for row in rows if row["exact_match"] is not None]
    if not scored:
        return None
    listed = "; ".join(_said(row) for row in scored)
    return pictures.draw(
        "sensitivity.png",
        f"Exact match as one setting at a time changes. {listed}.",
        lambda path, task: plot_sensitivity(path, scored, scored[0]["dense"], task),
    )


def _said(row: Mapping[str, Any]) -> str:
    default = " (default)" if row["is_default"] else ""
    return f"{row['factor']} {row['value']}{default}: {EXACT_MATCH.shown(row['exact_match'])}"
