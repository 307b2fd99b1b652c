"""Plots: one style, and the scores of the layers."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from gradpruner.errors import InvalidArgument
from gradpruner.storage.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Okabe and Ito's palette, told apart by every kind of colour vision and, by lightness and hatching, in print.
STYLES: dict[str, dict[str, Any]] = {
    "kept": {"color": "#0072B2"},
    "merged": {"color": "#E69F00", "hatch": "//"},
    "dropped": {"color": "#D9D9D9", "edgecolor": "#8C8C8C"},
}


class PlanLike(Protocol):
    """What a plot needs to know of a plan; `gradpruner.Plan` has it."""

    @property
    def layers(self) -> int:
        """Number of decoder layers."""

    @property
    def drop(self) -> Sequence[int]:
        """Layers removed outright."""

    @property
    def merge(self) -> Mapping[int, int] | Sequence[int]:
        """Layers folded into another one."""


def plot_layer_scores(
    scores: Sequence[float], plan: PlanLike, path: str | os.PathLike[str], title: str | None = None
) -> None:
    """Write a PNG of one bar per layer, on a logarithmic axis, coloured by what the plan does with the layer.

    Raises:
        InvalidArgument: matplotlib is missing, or `scores` is not one finite score per layer of the plan.
        CheckpointError: the file cannot be written.
    """
    figure = new_figure(9.6, 4.8)
    draw_layer_scores(figure.add_subplot(), scores, plan)
    if title:
        title_figure(figure, title)
    save_figure(figure, path)


def draw_layer_scores(axes: Axes, scores: Sequence[float], plan: PlanLike) -> None:
    """Draw what `plot_layer_scores` writes. Raises InvalidArgument if `scores` does not fit the plan."""
    values = [float(score) for score in scores]
    if len(values) != plan.layers:
        raise InvalidArgument(f"scores has {len(values)} values, but the plan is for {plan.layers} layers")
    if not all(math.isfinite(value) and value >= 0 for value in values):
        raise InvalidArgument("scores has a negative or non-finite value; accepted: 0 or more")
    fates = {**dict.fromkeys(plan.drop, "dropped"), **dict.fromkeys(plan.merge, "merged")}
    floor = _floor(values)
    for fate, style in STYLES.items():
        layers = [layer for layer in range(plan.layers) if fates.get(layer, "kept") == fate]
        if layers:
            heights = [max(values[layer] - floor, 0) for layer in layers]
            axes.bar(layers, heights, bottom=floor, width=0.8, label=f"{fate} ({len(layers)})", **style)
    for layer in (layer for layer, value in enumerate(values) if value == 0):
        axes.text(layer, floor, "0", ha="center", va="bottom")  # no logarithmic axis can show it
    axes.set_yscale("log")
    axes.set_ylim(bottom=floor)
    axes.set_xlim(-0.7, plan.layers - 0.3)
    axes.set_xticks(range(0, plan.layers, max(1, -(-plan.layers // 32))))
    style_axes(axes, "decoder layer", "layer score")
    # above the axes, where no bar can be
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=12)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches. Raises InvalidArgument where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure  # not pyplot, whose state belongs to the caller
    except ImportError:
        raise InvalidArgument("a plot needs matplotlib: pip install gradpruner[plot]") from None
    figure = Figure(figsize=(width, height), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def title_figure(figure: Figure, title: str) -> None:
    """Put a title over the whole figure, at its left."""
    figure.suptitle(title, fontsize=15, fontweight="bold", x=0.01, ha="left", parse_math=False)


def style_axes(axes: Axes, across: str, up: str, grid: Literal["x", "y"] = "y") -> None:
    """The look all plots share: open axes, a faint grid behind the data, labels that a slide can carry."""
    axes.set_xlabel(across, fontsize=13, parse_math=False)
    axes.set_ylabel(up, fontsize=13, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, alpha=0.3)
    axes.set_axisbelow(True)


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write the figure as a PNG, atomically. Raises CheckpointError if the file cannot be written."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _floor(values: Sequence[float]) -> float:
    """Where the logarithmic axis starts: the power of ten below the smallest positive score."""
    positive = [value for value in values if value > 0]
    if not positive:
        return 0.1
    return 10.0 ** math.floor(math.log10(min(positive) * 0.9))
