"""The style of every plot, and the plots that runs and comparisons share."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from gradpruner.errors import InvalidArgument
from gradpruner.storage.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette. Its colours differ for every kind of colour vision. In print, they differ by lightness and
# hatching.
INK, BLUE, GREY = "#1B1F24", "#0072B2", "#59636E"
STYLES: dict[str, dict[str, Any]] = {
    "kept": {"color": BLUE},
    "merged": {"color": "#E69F00", "hatch": "//"},
    "dropped": {"color": "#D9D9D9", "edgecolor": "#8C8C8C"},
}


class PlanLike(Protocol):
    """What a plot needs to know of a plan; `gradpruner.Plan` has it."""

    @property
    def layers(self) -> int:
        """Number of decoder layers before the cut."""

    @property
    def drop(self) -> Sequence[int]:
        """Layers that are removed outright."""

    @property
    def merge(self) -> Mapping[int, int] | Sequence[int]:
        """Layers that are merged into another one and then removed."""


@dataclass(frozen=True)
class LossCurve:
    """The training losses of consecutive optimizer steps.

    Args:
        start: optimizer steps of the run before the first loss. 0 for a run whose every step has one.
        values: one loss per step.
    """

    start: int
    values: Sequence[float]


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure.

    Args:
        width: in inches.
        height: in inches.

    Raises:
        InvalidArgument: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure  # not pyplot, whose state belongs to the caller
    except ImportError:
        raise InvalidArgument("a plot needs matplotlib: pip install gradpruner[plot]") from None
    figure = Figure(figsize=(width, height), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def title_figure(figure: Figure, title: str) -> None:
    """Put a title over the whole figure, at its left.

    Args:
        figure: the figure.
        title: plain text. Nothing in it is taken for mathematics.
    """
    figure.suptitle(title, fontsize=15, fontweight="bold", x=0.01, ha="left", parse_math=False)


def style_axes(axes: Axes, across: str, up: str, grid: Literal["x", "y"] = "y") -> None:
    """Give axes the look of all plots.

    No frame, a faint grid behind the data, labels that a slide can carry.

    Args:
        axes: the axes.
        across: label of the horizontal axis.
        up: label of the vertical axis.
        grid: the axis whose ticks have grid lines.
    """
    axes.set_xlabel(across, fontsize=13, parse_math=False)
    axes.set_ylabel(up, fontsize=13, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, alpha=0.3)
    axes.set_axisbelow(True)


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write the figure as a PNG, atomically.

    Args:
        figure: the figure.
        path: the file.

    Raises:
        CheckpointError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def png_of(figure: Figure) -> bytes:
    """Return the figure as a PNG, for a page that holds it without a file beside it."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def plot_layer_scores(
    scores: Sequence[float], plan: PlanLike, path: str | os.PathLike[str], title: str | None = None
) -> None:
    """Write a PNG with one bar per layer, coloured by what the plan does with the layer.

    Args:
        scores: one score per layer, 0 or more. The axis is logarithmic.
        plan: which layers are removed.
        path: the file.
        title: text over the plot.

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
    """Draw the plot of `plot_layer_scores` into axes.

    Args:
        axes: where to draw.
        scores: one score per layer.
        plan: which layers are removed.

    Raises:
        InvalidArgument: `scores` is not one finite score per layer of the plan.
    """
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


def draw_losses(axes: Axes, curves: Mapping[str, LossCurve], styles: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw training losses over the optimizer steps, smoothed, on a logarithmic axis.

    Args:
        axes: where to draw.
        curves: by the name that the legend shows; at least one.
        styles: by the same names, arguments of `Axes.plot`.
    """
    from matplotlib.ticker import LogLocator

    # about a fortieth of the longest run, so that curves of any length are as smooth as each other
    window = max(1, max(len(curve.values) for curve in curves.values()) // 40)
    for name, curve in curves.items():
        smooth = running_mean(curve.values, window)
        axes.plot(range(curve.start, curve.start + len(smooth)), smooth, label=name, **styles[name])
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))  # even a narrow range of losses has numbers then
    axes.set_xlim(0, max(curve.start + len(curve.values) for curve in curves.values()) * 1.01)
    style_axes(axes, "optimizer step", f"training loss, mean of {window} steps" if window > 1 else "training loss")


def mark_probe(axes: Axes, steps: int) -> None:
    """Shade the steps of the probe, which come before the cut.

    Args:
        axes: axes whose horizontal axis counts optimizer steps.
        steps: how many steps the probe had.
    """
    axes.axvspan(0, steps, color=INK, alpha=0.06, linewidth=0)
    place = axes.get_xaxis_transform()
    axes.text(steps / 2, 0.03, "probe", transform=place, ha="center", va="bottom", rotation=90, fontsize=11)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value and those before it in the window, fewer at the start.

    Args:
        values: the values in order.
        window: how many values a mean is made of.
    """
    parts = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return [sum(part) / len(part) for part in parts]


def _floor(values: Sequence[float]) -> float:
    """Return where the axis starts: the power of ten below the smallest positive score."""
    positive = [value for value in values if value > 0]
    if not positive:
        return 0.1
    return 10.0 ** math.floor(math.log10(min(positive) * 0.9))
