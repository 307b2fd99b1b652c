"""The plots of what the methods reach: accuracy, losses, costs.

Each is a PNG that can stand alone on a slide.
"""

from __future__ import annotations

import itertools
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradpruner.compare.analysis import DENSE, Comparison, Spread, cost_shares, near_paper
from gradpruner.compare.results import Cost
from gradpruner.report.numbers import share_text
from gradpruner.report.plots import (
    BLUE,
    GREY,
    INK,
    LossCurve,
    draw_losses,
    mark_probe,
    new_figure,
    save_figure,
    style_axes,
    title_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Target = str | os.PathLike[str]
Losses = Mapping[tuple[str, int, int], Sequence[float]]  # by method, number of removed layers and seed

# Okabe and Ito's palette without its yellow, which is hard to see on white. Blue is only for the default method.
COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
LINES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)))
MARKERS = "sD^vPX<>hp"
WIDTH, HEIGHT = 9.6, 5.4  # inches; a slide's shape


def method_styles(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Return one look per method, the same in every plot.

    No two methods share colour, dashes and marker.
    """
    styles: dict[str, dict[str, Any]] = {DENSE: {"color": INK, "linestyle": (0, (6, 2)), "linewidth": 1.8}}
    styles[comparison.default] = {"color": BLUE, "marker": "o", "markersize": 9, "linewidth": 3.6, "zorder": 5}
    for index, name in enumerate(comparison.methods[1:]):
        styles[name] = {
            "color": COLOURS[index % len(COLOURS)],
            "linestyle": LINES[index // len(COLOURS) % len(LINES)],
            "marker": MARKERS[index % len(MARKERS)],
            "markersize": 6.5,
            "linewidth": 1.7,
            "zorder": 3,
        }
    return styles


def plot_accuracy(path: Target, comparison: Comparison, task: str) -> None:
    """Plot the metric against the share of layers removed, one line per method.

    Args:
        path: the PNG.
        comparison: the results. The band reaches from the worst to the best seed.
        task: one line at the foot of the plot.
    """
    figure = new_figure(WIDTH, HEIGHT)
    axes = figure.add_subplot()
    styles = method_styles(comparison)
    points = {name: of_method for name in comparison.methods if (of_method := _points(comparison, name))}
    ratios = sorted({ratio for of_method in points.values() for ratio in of_method})
    reach = ratios[-1] - ratios[0]
    margin = 0.03 * reach or 0.4  # with one share, the points form a single column
    half = 0.5 * margin if reach else 0.016
    for name, of_method in points.items():
        xs = sorted(of_method)
        axes.plot(xs, [of_method[x].mean for x in xs], label=name, **styles[name])
        several = [x for x in xs if of_method[x].seeds > 1]
        for band in _runs(xs, several):
            # a single point has no width of its own to show a band on
            wide = band if len(band) > 1 else [band[0] - half, band[0] + half]
            at = band if len(band) > 1 else band * 2
            lows, highs = [of_method[x].low for x in at], [of_method[x].high for x in at]
            axes.fill_between(wide, lows, highs, color=styles[name]["color"], alpha=0.22, linewidth=0, label=name)
    ends = {name: of_method[max(of_method)].mean for name, of_method in points.items()}
    dense = comparison.spread(DENSE)
    if dense:
        axes.axhline(dense.mean, label=DENSE, **styles[DENSE])
        if dense.seeds > 1:
            axes.axhspan(dense.low, dense.high, color=INK, alpha=0.1, linewidth=0, label=DENSE)
        ends[DENSE] = dense.mean
    axes.set_xlim(ratios[0] - margin, ratios[-1] + margin)
    axes.set_xticks(ratios, [share_text(ratio) for ratio in ratios])
    style_axes(axes, f"share of the {comparison.layers} decoder layers removed", comparison.metric.name)
    _add_legend(figure, comparison, ends)
    finish_plot(figure, path, f"{capitalised(comparison.metric.name)} after removing layers", task)


def plot_losses(path: Target, comparison: Comparison, losses: Losses, task: str) -> None:
    """Plot the smoothed training losses over the optimizer steps.

    Args:
        path: the PNG.
        comparison: the results. Each method is shown at the main number of removed layers.
        losses: one per step after the cut, by method, number of removed layers and seed.
        task: one line at the foot of the plot.
    """
    figure = new_figure(WIDTH, HEIGHT)
    axes = figure.add_subplot()
    curves = loss_curves(comparison, losses)
    styles = {name: {**style, "marker": ""} for name, style in method_styles(comparison).items()}
    styles[DENSE]["linestyle"] = "-"  # a curve like the others here, not a level to compare with
    draw_losses(axes, curves, styles)
    starts = sorted({curve.start for name, curve in curves.items() if name != DENSE and curve.start})
    if starts:
        mark_probe(axes, starts[0])
    _add_legend(figure, comparison, {name: curve.values[-1] for name, curve in curves.items()})
    finish_plot(figure, path, f"Training loss with {comparison.main} of {comparison.layers} layers removed", task)


def loss_curves(comparison: Comparison, losses: Losses) -> dict[str, LossCurve]:
    """Return the losses of the dense model and of each method, means over the seeds.

    Each method is taken at the main number of removed layers. A pruned run has more steps than losses. The missing
    ones were the probe's, before the cut.

    Args:
        comparison: the results.
        losses: one per step after the cut, by method, number of removed layers and seed.
    """
    curves = {}
    for name in (DENSE, *comparison.methods):
        runs = [(run.steps, losses.get((name, run.count, run.seed), ())) for run in comparison.at(name)]
        known = [values for _, values in runs if values]
        if known:
            start = max(0, *(steps - len(values) for steps, values in runs if values))
            columns = zip(*known, strict=False)  # a run may have ended early
            curves[name] = LossCurve(start, [math.fsum(column) / len(column) for column in columns])
    return curves


def plot_costs(path: Target, comparison: Comparison, costs: Sequence[Cost], task: str) -> None:
    """Plot the costs at the main number as shares of the dense model's.

    A tick shows the paper's figure, where it has one.

    Args:
        path: the PNG.
        comparison: the results.
        costs: what was measured, the dense model and the main one among them.
        task: one line at the foot of the plot.
    """
    figure = new_figure(WIDTH, 4.6)
    axes = figure.add_subplot()
    shares = cost_shares(costs, comparison.main)
    axes.barh([measure.name for measure in shares], list(shares.values()), color=BLUE, height=0.62)
    paper = {row: measure.paper for row, measure in enumerate(shares) if measure.paper is not None}
    if paper and near_paper(comparison):
        label = "the paper's figure: Llama-3.1-8B, 40 % of layers removed"
        tops, bottoms = [row + 0.42 for row in paper], [row - 0.42 for row in paper]
        axes.vlines(list(paper.values()), bottoms, tops, color="#D55E00", linewidth=3.5, label=label)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=12, borderaxespad=0.2)
    for row, share in enumerate(shares.values()):
        axes.text(0.012, row, f"{share:.2f}", va="center", color="white", fontsize=14, fontweight="bold")
    axes.axvline(1, color=INK, linewidth=1.8, linestyle=(0, (6, 2)))
    axes.set_xlim(0, max(1.04, *(share * 1.04 for share in shares.values())))
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0, labelsize=13)
    style_axes(axes, "share of the dense model's cost (dashed line: dense)", "", grid="x")
    finish_plot(figure, path, f"Cost with {comparison.main} of {comparison.layers} layers removed", task)


def finish_plot(figure: Figure, path: Target, title: str, task: str) -> None:
    """Write the title above and the task below a figure, then write the file.

    Args:
        figure: the figure.
        path: the PNG.
        title: what is shown.
        task: what was trained on what.
    """
    title_figure(figure, title)
    figure.supxlabel(textwrap.fill(task, 110), x=0.99, ha="right", fontsize=10.5, color=GREY, parse_math=False)
    layout = figure.get_layout_engine()
    assert layout
    layout.set(w_pad=0.12, h_pad=0.1)  # type: ignore[call-arg]  # room to the edges of a card or slide
    save_figure(figure, path)


def capitalised(text: str) -> str:
    """Return the text with its first letter large and the others as they are."""
    return text[:1].upper() + text[1:]


def _points(comparison: Comparison, method: str) -> dict[float, Spread]:
    """Return the method's scores by the share of layers removed."""
    scores = {comparison.ratio(count): comparison.spread(method, count) for count in comparison.counts(method)}
    return {ratio: score for ratio, score in scores.items() if score is not None}


def _runs(xs: Sequence[float], wanted: Sequence[float]) -> list[list[float]]:
    """Return the stretches of neighbours among `xs` that are all wanted."""
    groups = itertools.groupby(xs, key=lambda x: x in wanted)
    return [list(group) for is_wanted, group in groups if is_wanted]


def _add_legend(figure: Figure, comparison: Comparison, ends: Mapping[str, float]) -> None:
    """Put a legend to the right of the axes, in the order in which the lines end."""
    handles = {line.get_label(): line for line in figure.axes[0].lines}
    names = sorted(ends, key=lambda name: -ends[name] if math.isfinite(ends[name]) else math.inf)
    legend = figure.legend(
        [handles[name] for name in names],
        names,
        loc="outside right upper",
        frameon=False,
        fontsize=12,
        handlelength=2.2,
        labelspacing=0.45,
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_fontweight("bold" if name == comparison.default else "normal")
