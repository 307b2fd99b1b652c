"""The plots of a comparison, each a PNG that can stand alone on a slide."""

from __future__ import annotations

import itertools
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradpruner.compare.analysis import DENSE, Comparison, cost_shares, near_paper, share_text, spread
from gradpruner.compare.results import Cost
from gradpruner.report.plots import STYLES, draw_layer_scores, new_figure, save_figure, style_axes, title_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gradpruner.plan import Plan

Target = str | os.PathLike[str]
Losses = Mapping[tuple[str, int, int], Sequence[float]]

# Okabe and Ito's palette without its yellow, which white paper swallows; blue is the default method's alone
INK, BLUE, GONE = "#1B1F24", "#0072B2", "#59636E"
COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
LINES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)))
MARKERS = "sD^vPX<>hp"
WIDTH, HEIGHT = 9.6, 5.4  # inches; a slide's shape


@dataclass(frozen=True)
class _End:
    """Where a line ends, and what to write there."""

    name: str
    x: float
    y: float
    style: Mapping[str, Any]


@dataclass(frozen=True)
class LossCurve:
    """Losses of consecutive optimizer steps, the mean over the seeds, and the first one's number."""

    start: int
    values: Sequence[float]


def method_styles(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """One look a method, the same in every plot: colours, then dashes tell apart, markers always."""
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
    """The metric against the share of layers removed: a line a method, its band from the worst to the best seed."""
    figure = new_figure(WIDTH, HEIGHT)
    axes = figure.add_subplot()
    styles = method_styles(comparison)
    points = {name: _points(comparison, name) for name in comparison.methods}
    ratios = sorted({ratio for of_method in points.values() for ratio in of_method})
    reach = ratios[-1] - ratios[0]
    margin = 0.03 * reach or 0.4  # of one share there is but a column of points
    half = 0.5 * margin if reach else 0.016
    ends = []
    for name, of_method in points.items():
        if not of_method:
            continue
        xs = sorted(of_method)
        axes.plot(xs, [of_method[x].mean for x in xs], label=name, **styles[name])
        several = [x for x in xs if of_method[x].seeds > 1]
        for band in _runs(xs, several):
            # a single point has no width of its own to show a band on
            wide = band if len(band) > 1 else [band[0] - half, band[0] + half]
            at = band if len(band) > 1 else band * 2
            lows, highs = [of_method[x].low for x in at], [of_method[x].high for x in at]
            axes.fill_between(wide, lows, highs, color=styles[name]["color"], alpha=0.22, linewidth=0, label=name)
        ends.append(_End(name, xs[-1], of_method[xs[-1]].mean, styles[name]))
    dense = comparison.spread(DENSE)
    right = ratios[-1] + margin
    if dense:
        axes.axhline(dense.mean, label=DENSE, **styles[DENSE])
        if dense.seeds > 1:
            axes.axhspan(dense.low, dense.high, color=INK, alpha=0.1, linewidth=0, label=DENSE)
        ends.append(_End(DENSE, right, dense.mean, styles[DENSE]))
    axes.set_xlim(ratios[0] - margin, right)
    axes.set_xticks(ratios, [share_text(ratio) for ratio in ratios])
    style_axes(axes, f"share of the {comparison.layers} decoder layers removed", comparison.metric.name)
    _label_ends(axes, ends, HEIGHT)
    _finish(figure, path, f"{_capital(comparison.metric.name)} after removing layers", task)


def plot_layers(
    path: Target,
    comparison: Comparison,
    task: str,
    scores: Sequence[float] = (),
    plan: Plan | None = None,
) -> None:
    """The layer scores, and below them which layers each method removes at the main number.

    Raises InvalidArgument if the scores do not fit the plan.
    """
    rows = [name for name in comparison.methods if any(run.removed for run in comparison.at(name))]
    heights = [2.8] * (plan is not None) + [0.5 + 0.26 * len(rows)] * bool(rows)
    figure = new_figure(WIDTH, 1.2 + sum(heights))
    panels = list(figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0])
    if plan is not None:
        draw_layer_scores(panels[0], scores, plan)
    if rows:
        _draw_removed(panels[-1], comparison, rows)
        if plan is not None:
            panels[0].set_xlabel("")
    title = f"which {comparison.main} of {comparison.layers} layers each method removes"
    both = f"Layer scores, and {title}" if rows else "Layer scores"
    _finish(figure, path, both if plan is not None else _capital(title), task)


def plot_settling(path: Target, stability: Sequence[float], task: str) -> None:
    """After each step of the probe, the share of the removed layers that the set held already."""
    figure = new_figure(WIDTH, 4.0)
    axes = figure.add_subplot()
    steps = range(1, len(stability) + 1)
    axes.plot(steps, stability, color=BLUE, linewidth=2.6, marker="o", markersize=5 if len(stability) <= 60 else 0)
    axes.fill_between(steps, stability, color=BLUE, alpha=0.1, linewidth=0)
    axes.set_ylim(0, 1.04)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axes.locator_params(axis="x", integer=True)
    step = settled(stability)
    if step is not None:
        axes.axvline(step, color=INK, linewidth=1.2, linestyle=(0, (2, 2)))
        late = step > 0.6 * len(stability)
        axes.annotate(
            f"settled after step {step}",
            (step, 0.1),
            xytext=(-8 if late else 8, 0),
            textcoords="offset points",
            ha="right" if late else "left",
            fontsize=13,
            fontweight="bold",
            color=INK,
        )
    style_axes(axes, "probe step", "removed layers settled")
    _finish(figure, path, "How much of the removed set has settled, by probe step", task)


def settled(stability: Sequence[float]) -> int | None:
    """The step from which on the removed set is the final one; None if it never is."""
    unsettled = [step for step, share in enumerate(stability, 1) if share < 1]
    step = unsettled[-1] + 1 if unsettled else 1
    return step if step <= len(stability) else None


def plot_losses(path: Target, comparison: Comparison, losses: Losses, task: str) -> None:
    """The training loss over the optimizer steps, smoothed: of the dense model, and of each at the main number."""
    figure = new_figure(WIDTH, HEIGHT)
    axes = figure.add_subplot()
    styles = method_styles(comparison)
    curves = loss_curves(comparison, losses)
    window = max(1, max(len(curve.values) for curve in curves.values()) // 40)
    ends = []
    for name, curve in curves.items():
        smooth = running_mean(curve.values, window)
        style = {**styles[name], "marker": ""}
        if name == DENSE:
            style["linestyle"] = "-"  # a curve like the others here, not a level to compare with
        steps = range(curve.start, curve.start + len(smooth))
        axes.plot(steps, smooth, label=name, **style)
        if math.isfinite(smooth[-1]) and smooth[-1] > 0:  # else there is no end to see
            ends.append(_End(name, steps[-1], smooth[-1], style))
    starts = sorted({curve.start for name, curve in curves.items() if name != DENSE and curve.start})
    if starts:
        axes.axvspan(0, starts[0], color=INK, alpha=0.06, linewidth=0)
        where = axes.get_xaxis_transform()
        axes.text(starts[0] / 2, 0.03, "probe", transform=where, ha="center", va="bottom", rotation=90, fontsize=11)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    _few_minor_labels(axes)
    axes.set_xlim(0, max(curve.start + len(curve.values) for curve in curves.values()) * 1.01)
    style_axes(axes, "optimizer step", f"training loss, mean of {window} steps" if window > 1 else "training loss")
    _label_ends(axes, ends, HEIGHT)
    _finish(figure, path, f"Training loss with {comparison.main} of {comparison.layers} layers removed", task)


def loss_curves(comparison: Comparison, losses: Losses) -> dict[str, LossCurve]:
    """The dense model's losses and each method's at the main number.

    What a run's steps are more than its losses were the probe's, before the cut.
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


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and of those before it in the window; of fewer at the start."""
    parts = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return [sum(part) / len(part) for part in parts]


def plot_costs(path: Target, comparison: Comparison, costs: Sequence[Cost], task: str) -> None:
    """The costs at the main number as shares of the dense model's, with ticks where the source reports a figure."""
    figure = new_figure(WIDTH, 4.6)
    axes = figure.add_subplot()
    shares = cost_shares(costs, comparison.main)
    names = [measure.name for measure in shares]
    axes.barh(names, list(shares.values()), color=BLUE, height=0.62)
    paper = {row: measure.paper for row, measure in enumerate(shares) if measure.paper is not None}
    if paper and near_paper(comparison):
        rows = list(paper)
        label = "the paper's figure: Llama-3.1-8B, 40 % of layers removed"
        tops, bottoms = [row + 0.42 for row in rows], [row - 0.42 for row in rows]
        axes.vlines(list(paper.values()), bottoms, tops, color="#D55E00", linewidth=3.5, label=label)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=12, borderaxespad=0.2)
    for row, share in enumerate(shares.values()):
        axes.text(0.012, row, f"{share:.2f}", va="center", color="white", fontsize=14, fontweight="bold")
    axes.axvline(1, color=INK, linewidth=1.8, linestyle=(0, (6, 2)))
    axes.set_xlim(0, max(1.04, *(share * 1.04 for share in shares.values())))
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0, labelsize=13)
    style_axes(axes, "share of the dense model's cost (dashed line: dense)", "", grid="x")
    _finish(figure, path, f"Cost with {comparison.main} of {comparison.layers} layers removed", task)


def plot_sensitivity(path: Target, rows: Sequence[Mapping[str, Any]], dense: float | None, task: str) -> None:
    """A panel a factor: what exact match becomes as that factor alone changes; the default's point is filled."""
    factors = list(dict.fromkeys(row["factor"] for row in rows))
    columns = min(len(factors), 4)
    lines = -(-len(factors) // columns)
    figure = new_figure(WIDTH, 0.5 + 3.3 * lines)
    widest = [max(_values(rows, factor) for factor in factors[column::columns]) for column in range(columns)]
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False, width_ratios=widest)
    panels = list(grid.flat)
    for panel, factor in itertools.zip_longest(panels, factors):
        if factor is None:
            panel.set_visible(False)
            continue
        _draw_factor(panel, [row for row in rows if row["factor"] == factor], dense)
        style_axes(panel, textwrap.fill(str(factor), 16), "exact match" if panel in panels[::columns] else "")
    if dense is not None:
        panels[0].annotate(
            "dense", (0, dense), xycoords=("axes fraction", "data"), xytext=(5, 4), textcoords="offset points"
        )
    panels[0].margins(y=0.2)
    _finish(figure, path, "Exact match as one setting changes", task)


def _finish(figure: Figure, path: Target, title: str, task: str) -> None:
    """Say what is shown at the top and what was trained at the bottom, then write the file."""
    title_figure(figure, title)
    figure.supxlabel(textwrap.fill(task, 110), x=0.99, ha="right", fontsize=10.5, color=GONE, parse_math=False)
    layout = figure.get_layout_engine()
    assert layout
    layout.set(w_pad=0.12, h_pad=0.1)  # type: ignore[call-arg]  # room to the edges of a card or slide
    save_figure(figure, path)


def _values(rows: Sequence[Mapping[str, Any]], factor: str) -> int:
    return len({str(row["value"]) for row in rows if row["factor"] == factor})


def _draw_factor(axes: Axes, rows: Sequence[Mapping[str, Any]], dense: float | None) -> None:
    from matplotlib.patheffects import withStroke

    values = list(dict.fromkeys(str(row["value"]) for row in rows))
    at = range(len(values))
    found = (spread(row["exact_match"] for row in rows if str(row["value"]) == value) for value in values)
    means = [each.mean if each else math.nan for each in found]
    if all(_is_number(value) for value in values):
        axes.plot(at, means, color=BLUE, linewidth=1.6, alpha=0.6, zorder=2)
    defaults = {str(row["value"]) for row in rows if row["is_default"]}
    for x, value, mean in zip(at, values, means, strict=True):
        is_default = value in defaults
        axes.plot(
            x, mean, "o", color=BLUE, markersize=12 if is_default else 8, mfc=BLUE if is_default else "white", mew=2
        )
        if not math.isnan(mean):
            axes.annotate(
                f"{mean:.3f}",
                (x, mean),
                xytext=(0, 9),
                textcoords="offset points",
                ha="center",
                fontsize=10,
                fontweight="bold" if is_default else "normal",
                path_effects=[withStroke(linewidth=3, foreground="white")],  # legible where a line passes
            )
    if dense is not None:
        axes.axhline(dense, color=INK, linewidth=1.4, linestyle=(0, (6, 2)), zorder=1)
    axes.set_xlim(-0.6, len(values) - 0.4)
    slant: dict[str, Any] = {"rotation": 20, "ha": "right"} if max(map(len, values)) > 9 else {}
    axes.set_xticks(at, values, parse_math=False, **slant)


def _draw_removed(axes: Axes, comparison: Comparison, rows: Sequence[str]) -> None:
    """A row a method, a cell a layer, the fuller the more seeds removed it."""
    from matplotlib.patches import Patch

    for row, name in enumerate(rows):
        runs = comparison.at(name)
        merged = {donor for run in runs for donor in _donors(run.merged)}
        lefts = [layer - 0.4 for layer in range(comparison.layers)]
        axes.barh([row] * comparison.layers, 0.8, left=lefts, height=0.74, color="#F1F3F5")
        for layer in range(comparison.layers):
            share = sum(layer in _layers(run.removed) for run in runs) / len(runs)
            if share:
                fill = {**STYLES["merged"], "edgecolor": "white"} if layer in merged else {"color": GONE}
                axes.barh(row, 0.8, left=layer - 0.4, height=0.74, alpha=0.15 + 0.85 * share, label=name, **fill)
    axes.set_yticks(range(len(rows)), rows, parse_math=False)
    for label, name in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if name == comparison.default else "normal")
    axes.invert_yaxis()
    axes.set_xlim(-0.7, comparison.layers - 0.3)
    axes.set_xticks(range(0, comparison.layers, max(1, -(-comparison.layers // 32))))
    style_axes(axes, "decoder layer", "")
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    differ = any(len({run.removed for run in comparison.at(name)}) > 1 for name in rows)
    patches = [Patch(color=GONE, label="removed" + " (paler: with some seeds only)" * differ)]
    if any(run.merged for name in rows for run in comparison.at(name)):
        patches.append(Patch(facecolor=STYLES["merged"]["color"], hatch="//", edgecolor="white", label="merged"))
    axes.legend(handles=patches, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=12)


def _points(comparison: Comparison, method: str) -> dict[float, Any]:
    found = {comparison.ratio(count): comparison.spread(method, count) for count in comparison.counts(method)}
    return {ratio: each for ratio, each in found.items() if each is not None}


def _runs(xs: Sequence[float], wanted: Sequence[float]) -> list[list[float]]:
    """The stretches of neighbours among `xs` that are all wanted."""
    groups = itertools.groupby(xs, key=lambda x: x in wanted)
    return [list(group) for is_wanted, group in groups if is_wanted]


def _label_ends(axes: Axes, ends: Sequence[_End], height: float, size: float = 12.5) -> None:
    """Write each line's name to the right of its end, moved up or down so that none touches another."""
    axes.set_ylim(axes.get_ylim())
    axes.set_xlim(axes.get_xlim())
    if not ends:
        return
    ordered = sorted(ends, key=lambda end: end.y)
    at = axes.transAxes.inverted().transform(axes.transData.transform([(end.x, end.y) for end in ordered]))
    # the axes are the figure without its title and the labels below, about 1.3 inches
    places = spaced([float(y) for _, y in at], 1.3 * size / 72 / (height - 1.3), 0, 1.02)
    for end, (x, y), place in zip(ordered, at, places, strict=True):
        looks = {"color": end.style["color"], "clip_on": False, "transform": axes.transAxes, "label": "_name"}
        if x > 0.9:  # else its leader would cross the lines that go on
            axes.plot([x, 1.02, 1.032], [y, place, place], linewidth=0.9, alpha=0.7, **looks)
        if end.style.get("marker"):
            axes.plot([1.05], [place], marker=end.style["marker"], markersize=7, **looks)
        else:
            axes.plot([1.034, 1.062], [place] * 2, linestyle=end.style.get("linestyle", "-"), linewidth=2.2, **looks)
        axes.text(
            1.07,
            place,
            end.name,
            transform=axes.transAxes,
            va="center",
            fontsize=size,
            fontweight="bold" if end.style.get("linewidth", 0) > 3 else "normal",
            color=INK,
            parse_math=False,
        )


def spaced(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending places moved as little as may be (least squares) until they are `gap` apart and within the bounds."""
    blocks: list[tuple[float, int]] = []  # mean and size, of the places less their share of the gaps
    for index, place in enumerate(places):
        mean, size = place - index * gap, 1
        while blocks and blocks[-1][0] >= mean:
            before, count = blocks.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        blocks.append((mean, size))
    flat = [mean for mean, size in blocks for _ in range(size)]
    top = high - (len(places) - 1) * gap
    return [min(max(value, low), max(top, low)) + index * gap for index, value in enumerate(flat)]


def _few_minor_labels(axes: Axes) -> None:
    """Label 2 and 5 between the powers of ten, so that even a narrow range of losses has numbers."""
    from matplotlib.ticker import LogLocator

    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _layers(text: str) -> set[int]:
    return {int(part) for part in text.split()}


def _donors(text: str) -> set[int]:
    return {int(part.partition(">")[0]) for part in text.split()}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
