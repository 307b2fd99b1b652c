"""The report of a comparison: one HTML page that needs nothing else, and its plots as PNGs beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradpruner.compare import plots as figures
from gradpruner.compare.analysis import DENSE, EXACT_MATCH, Comparison, cost_shares, headline, share_text, spread
from gradpruner.compare.results import Cost, Result
from gradpruner.compare.tables import costs_table, counts_table, duration, losses_table, main_table, quantity
from gradpruner.report.pages import CSS, base64_png, escaped, write_page

PICTURES = ("accuracy.png", "layers.png", "settling.png", "losses.png", "costs.png", "sensitivity.png")
EXTRA_CSS = """
body { max-width: 64rem; }
th, td { padding: .4rem .6rem; }
h1 { margin-bottom: 0; line-height: 1.25; }
h2 { margin: 2.75rem 0 .5rem; font-size: 1.25rem; }
.task { margin: .25rem 0 0; opacity: .8; }
.answer { margin: 1.25rem 0; padding-left: 1rem; border-left: .3rem solid #0072B2; font-size: 1.3rem;
  line-height: 1.4; text-wrap: pretty; }
dl { margin: 1.5rem 0; grid-template-columns: repeat(auto-fill, minmax(min(13rem, 44%), 1fr)); }
dd small, .note { display: block; font-size: .85rem; font-weight: 400; opacity: .8; }
.scroll img { min-width: 37rem; margin: .75rem 0; }
table { white-space: nowrap; font-size: .95rem; }
th { font-weight: 600; }
thead th { vertical-align: bottom; font-size: .85rem; }
tbody th { font-weight: 400; }
tr > :first-child { position: sticky; left: 0; background: var(--paper); }
.ours th, .ours td { font-weight: 700; background: var(--soft); }
.tag { display: inline-block; min-width: 3.6rem; margin-right: .35rem; padding: 0 .4rem; border: 1px solid var(--line);
  border-radius: .3rem; font-size: .8rem; text-align: center; }
.ahead { border-color: #0072B2; background: #0072B2; color: #ffffff; }
.behind { border-color: #B34700; background: #B34700; color: #ffffff; }
details { margin: 1rem 0; }
summary { cursor: pointer; }
li { overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) { img { filter: brightness(.93); } }
@media print { .scroll { overflow: visible; } .scroll img { min-width: 0; } }
"""


def write_comparison(
    folder: str | os.PathLike[str],
    *,
    title: str,
    task: str,
    results: Sequence[Result],
    losses: figures.Losses,
    costs: Sequence[Cost],
    differences: Sequence[Mapping[str, Any]],
    probe: Mapping[str, Any] | None = None,
    sensitivity: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Write report.html and its plots to an existing folder; what there is no data for is left out.

    losses: by method, number of removed layers and seed, of every step after the cut. differences: rows with method,
    count, difference, low and high, the default method minus that one in exact match. probe: layer_scores by kind,
    the kind that was used, stability (the settled share of the removed set after each step) and plan.
    sensitivity: rows with factor, value, exact_match, is_default and dense, the dense model's exact match.

    Raises:
        InvalidArgument: no pruned model, a run twice, a missing folder, scores that do not fit the plan, or no
            matplotlib.
        CheckpointError: a file cannot be written.
    """
    plan = probe["plan"] if probe else None
    comparison = Comparison(results, differences, None if plan is None else len(plan.removed))
    pictures = _Pictures(Path(folder), task)
    body = [
        f'<h1>{escaped(title)}</h1>\n<p class="task">{escaped(task)}</p>\n',
        f'<p class="answer">{escaped(headline(comparison, costs))}</p>\n',
        _key_figures(comparison, costs),
        _accuracy(comparison, pictures),
        _layers(comparison, pictures, probe),
        _settling(pictures, probe),
        _losses(comparison, pictures, losses),
        _costs(comparison, pictures, costs),
        _sensitivity(pictures, sensitivity),
        _notes(notes),
    ]
    pictures.remove_others()
    path = Path(folder) / "report.html"
    write_page(path, title, "".join(body), CSS + EXTRA_CSS)
    return path


class _Pictures:
    """Draws the plots into the folder, and keeps account of which."""

    def __init__(self, folder: Path, task: str) -> None:
        self.folder, self.task = folder, task
        self.drawn: set[str] = set()

    def draw(self, name: str, says: str, plot: Callable[[Path, str], None]) -> str:
        """Draw one, and give it as HTML; `says` is what it shows, for who cannot see it."""
        plot(self.folder / name, self.task)
        self.drawn.add(name)
        image = f'<img alt="{escaped(says)}" src="data:image/png;base64,{base64_png(self.folder / name)}">'
        return f'<div class="scroll" role="region" aria-label="Plot" tabindex="0">{image}</div>\n'

    def remove_others(self) -> None:
        """Remove what an earlier report left here and this one has no data for."""
        for name in PICTURES:
            if name not in self.drawn:
                (self.folder / name).unlink(missing_ok=True)


def _key_figures(comparison: Comparison, costs: Sequence[Cost]) -> str:
    metric = comparison.metric
    here, dense = comparison.spread(comparison.default), comparison.spread(DENSE)
    runs, dense_runs = comparison.at(comparison.default), comparison.at(DENSE)
    tiles = []
    if here:
        tiles.append((metric.name, metric.shown(here.mean), f"dense {metric.shown(dense.mean)}" if dense else ""))
    left = f"{comparison.layers - comparison.main} of {comparison.layers}"
    tiles.append(("decoder layers left", left, f"{share_text(comparison.ratio(comparison.main))} removed"))
    parameters = runs[0].parameters
    share = f"{share_text(parameters / dense_runs[0].parameters)} of dense" if dense_runs else ""
    tiles.append(("parameters left", quantity(parameters, ""), share))
    for measure, part in cost_shares(costs, comparison.main).items():
        if measure.paper is not None:  # what people ask for; the rest is further below
            tiles.append((measure.name, f"{part:.2f}", "of dense"))
    seconds, of_dense = spread(run.seconds for run in runs), spread(run.seconds for run in dense_runs)
    if seconds and not costs:  # those are measured alone and in turns; a run's own time is also what else ran then
        tiles.append(("whole run", duration(seconds.mean), f"dense {duration(of_dense.mean)}" if of_dense else ""))
    html = "".join(
        f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}<small>{escaped(small)}</small></dd></div>\n"
        for name, value, small in tiles
    )
    return f"<dl>\n{html}</dl>\n"


def _accuracy(comparison: Comparison, pictures: _Pictures) -> str:
    metric, main = comparison.metric, comparison.main
    names = comparison.best_first()
    if not names:
        return ""
    means = {name: each.mean for name in (DENSE, *names) if (each := comparison.spread(name))}
    listed = ", ".join(f"{name} {metric.shown(mean)}" for name, mean in means.items())
    picture = pictures.draw(
        "accuracy.png",
        f"Line plot of {metric.name} against the share of layers removed, a line a method. "
        f"At {share_text(comparison.ratio(main))}: {listed}.",
        lambda path, task: figures.plot_accuracy(path, comparison, task),
    )
    several = any(len(runs) > 1 for runs in comparison.groups.values())
    bands = "Lines: means over the seeds. Bands: from the lowest seed to the highest. " if several else ""
    examples = comparison.at(names[0])[0].examples
    return (
        f'<h2>Accuracy</h2>\n{picture}<p class="note">{bands}Each run is scored on {examples} examples.</p>\n'
        f"<h2>With {main} of {comparison.layers} layers removed</h2>\n"
        f"{main_table(comparison)}{counts_table(comparison)}"
    )


def _layers(comparison: Comparison, pictures: _Pictures, probe: Mapping[str, Any] | None) -> str:
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
        return ""
    picture = pictures.draw(
        "layers.png",
        " ".join(says),
        lambda path, task: figures.plot_layers(path, comparison, task, scores, plan),
    )
    return f"<h2>Which layers go</h2>\n{picture}"


def _settling(pictures: _Pictures, probe: Mapping[str, Any] | None) -> str:
    stability = probe["stability"] if probe else ()
    if not stability:
        return ""
    step = figures.settled(stability)
    when = "never settles" if step is None else f"is the final one from step {step} on"
    says = f"Of {len(stability)} probe steps, the removed set {when}."
    picture = pictures.draw(
        "settling.png",
        f"Line plot of the share of the finally removed layers in the removed set after each probe step. {says}",
        lambda path, task: figures.plot_settling(path, stability, task),
    )
    return f"<h2>How soon the choice settles</h2>\n<p>{says}</p>\n{picture}"


def _losses(comparison: Comparison, pictures: _Pictures, losses: figures.Losses) -> str:
    curves = figures.loss_curves(comparison, losses)
    if not curves:
        return ""
    ends = ", ".join(f"{name} {curve.values[-1]:.3g}" for name, curve in curves.items())
    picture = pictures.draw(
        "losses.png",
        f"Line plot of the training loss against optimizer steps. At the last step: {ends}.",
        lambda path, task: figures.plot_losses(path, comparison, losses, task),
    )
    return f"<h2>Training</h2>\n{picture}{losses_table(comparison)}"


def _costs(comparison: Comparison, pictures: _Pictures, costs: Sequence[Cost]) -> str:
    shares = cost_shares(costs, comparison.main)
    if not shares:
        return ""
    listed = ", ".join(f"{measure.name} {share:.2f}" for measure, share in shares.items())
    picture = pictures.draw(
        "costs.png",
        f"Bars of the cost with {comparison.main} layers removed as a share of the dense model's: {listed}.",
        lambda path, task: figures.plot_costs(path, comparison, costs, task),
    )
    return f"<h2>What it costs</h2>\n{picture}{costs_table(comparison, costs)}"


def _sensitivity(pictures: _Pictures, rows: Sequence[Mapping[str, Any]]) -> str:
    scored = [row for row in rows if row["exact_match"] is not None]
    if not scored:
        return ""
    listed = "; ".join(
        f"{row['factor']} {row['value']}{' (default)' * row['is_default']}: {EXACT_MATCH.shown(row['exact_match'])}"
        for row in scored
    )
    picture = pictures.draw(
        "sensitivity.png",
        f"Exact match as one setting at a time changes. {listed}.",
        lambda path, task: figures.plot_sensitivity(path, scored, scored[0]["dense"], task),
    )
    note = '<p class="note">One setting at a time; filled points are the defaults.</p>'
    return f"<h2>Sensitivity to the settings</h2>\n{picture}{note}\n"


def _notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{escaped(note)}</li>\n" for note in notes)
    return f"<h2>What was run</h2>\n<ul>\n{items}</ul>\n" if notes else ""
