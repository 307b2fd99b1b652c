"""The plots of the choice itself: removed layers, how soon they settle, settings."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradpruner.compare.analysis import Comparison, spread
from gradpruner.compare.plots import WIDTH, Target, capitalised, finish_plot
from gradpruner.report.plots import BLUE, GREY, INK, STYLES, draw_layer_scores, new_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from gradpruner.plan import Plan


def plot_layers(
    path: Target,
    comparison: Comparison,
    task: str,
    scores: Sequence[float] = (),
    plan: Plan | None = None,
) -> None:
    """Plot the layer scores, and below them the layers that each method removes.

    Each method is shown at the main number of removed layers.

    Args:
        path: the PNG.
        comparison: the results.
        task: one line at the foot of the plot.
        scores: one per decoder layer of the dense model, if there is a plan.
        plan: the plan whose layers are coloured. Without one only the second panel is drawn.

    Raises:
        InvalidArgument: the scores do not fit the plan.
    """
    rows = [name for name in comparison.methods if any(run.removed for run in comparison.at(name))]
    heights = []
    if plan is not None:
        heights.append(2.8)
    if rows:
        heights.append(0.5 + 0.26 * len(rows))
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
    finish_plot(figure, path, both if plan is not None else capitalised(title), task)


def plot_settling(path: Target, stability: Sequence[float], task: str) -> None:
    """Plot the share of the removed layers that had settled after each step of the probe.

    Args:
        path: the PNG.
        stability: one share per probe step, 0 to 1.
        task: one line at the foot of the plot.
    """
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
    finish_plot(figure, path, "How much of the removed set has settled, by probe step", task)


def settled(stability: Sequence[float]) -> int | None:
    """Return the step from which on the removed set is the final one, None if it never is."""
    unsettled = [step for step, share in enumerate(stability, 1) if share < 1]
    step = unsettled[-1] + 1 if unsettled else 1
    return step if step <= len(stability) else None


def plot_sensitivity(path: Target, rows: Sequence[Mapping[str, Any]], dense: float | None, task: str) -> None:
    """Plot exact match as one factor at a time changes, one panel per factor.

    Filled points are the defaults.

    Args:
        path: the PNG.
        rows: with factor, value, exact_match and is_default.
        dense: the dense model's exact match, if it was scored.
        task: one line at the foot of the plot.
    """
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
    finish_plot(figure, path, "Exact match as one setting changes", task)


def _values(rows: Sequence[Mapping[str, Any]], factor: str) -> int:
    return len({str(row["value"]) for row in rows if row["factor"] == factor})


def _draw_factor(axes: Axes, rows: Sequence[Mapping[str, Any]], dense: float | None) -> None:
    from matplotlib.patheffects import withStroke

    values = list(dict.fromkeys(str(row["value"]) for row in rows))
    at = range(len(values))
    spreads = (spread(row["exact_match"] for row in rows if str(row["value"]) == value) for value in values)
    means = [scores.mean if scores else math.nan for scores in spreads]
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
    """Draw one row per method, one cell per layer, darker where more seeds removed it."""
    from matplotlib.patches import Patch

    for row, name in enumerate(rows):
        runs = comparison.at(name)
        merged = {donor for run in runs for donor in _donors(run.merged)}
        lefts = [layer - 0.4 for layer in range(comparison.layers)]
        axes.barh([row] * comparison.layers, 0.8, left=lefts, height=0.74, color="#F1F3F5")
        for layer in range(comparison.layers):
            share = sum(layer in _layers(run.removed) for run in runs) / len(runs)
            if share:
                fill = {**STYLES["merged"], "edgecolor": "white"} if layer in merged else {"color": GREY}
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
    patches = [Patch(color=GREY, label="removed (paler: with some seeds only)" if differ else "removed")]
    if any(run.merged for name in rows for run in comparison.at(name)):
        patches.append(Patch(facecolor=STYLES["merged"]["color"], hatch="//", edgecolor="white", label="merged"))
    axes.legend(handles=patches, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=12)


def _layers(text: str) -> set[int]:
    """Return the layers of "5 6 8"."""
    return {int(part) for part in text.split()}


def _donors(text: str) -> set[int]:
    """Return the merged layers of "6>5 8>4", the targets left out."""
    return {int(part.partition(">")[0]) for part in text.split()}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
