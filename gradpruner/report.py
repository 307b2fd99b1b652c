"""What a person looks at: a plot of the layer scores, a self-contained HTML page, a plain-text table."""

from __future__ import annotations

import base64
import html
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
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
CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #f3f5f7; --line: #d5dae0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --paper: #14171a; --soft: #1f2429; --line: #39414a; }
}
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .75rem; }
dl div { padding: .6rem .9rem; background: var(--soft); border-radius: .5rem; overflow-wrap: anywhere; }
dt { font-size: .85rem; opacity: .8; }
dd { margin: 0; font-size: 1.25rem; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .75rem; border-bottom: 1px solid var(--line); text-align: left; }
.number { text-align: right; }
img { display: block; width: 100%; margin: 1.5rem 0; background: #ffffff; border-radius: .5rem; }
"""


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


def html_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    summary: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    plots: Sequence[Path | bytes] = (),
    explained: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> None:
    """Write one HTML page that needs nothing else: key figures, plots (PNG), and a table of `rows`.

    explained: below them, sentences, each with a table of its own.

    Raises:
        InvalidArgument: a plot does not exist or is not a PNG.
        CheckpointError: the file cannot be written.
    """
    figures = "".join(f"<div><dt>{escaped(key)}</dt><dd>{escaped(value)}</dd></div>" for key, value in summary.items())
    images = "".join(
        f'<img alt="Plot {number}" src="data:image/png;base64,{base64_png(plot)}">\n'
        for number, plot in enumerate(plots, 1)
    )
    body = f"<h1>{escaped(title)}</h1>\n<dl>{figures}</dl>\n{images}{_html_table(rows)}"
    body += "".join(f"<p>{escaped(text)}</p>\n{_html_table(of_it)}" for text, of_it in (explained or {}).items())
    write_page(path, title, body)


def write_page(path: str | os.PathLike[str], title: str, body: str, css: str = CSS) -> None:
    """Write an HTML page around a `body` that is HTML already. Raises CheckpointError if it cannot be written."""
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{css}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """`rows` as aligned text with a header, numbers to the right; "" without rows.

    The columns are all keys in order of appearance; a missing value is left blank.
    """
    columns = _columns(rows)
    cells = [columns, *([_shown(row.get(column)) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [_is_numeric(rows, column) for column in columns]
    lines = [
        "  ".join(
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines) if rows else ""


def _floor(values: Sequence[float]) -> float:
    """Where the logarithmic axis starts: the power of ten below the smallest positive score."""
    positive = [value for value in values if value > 0]
    if not positive:
        return 0.1
    return 10.0 ** math.floor(math.log10(min(positive) * 0.9))


def _html_table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    columns = _columns(rows)
    kinds = [' class="number"' if _is_numeric(rows, column) else "" for column in columns]
    head = "".join(f"<th{kind}>{escaped(c)}</th>" for c, kind in zip(columns, kinds, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{escaped(row.get(c))}</td>" for c, kind in zip(columns, kinds, strict=True))
        + "</tr>\n"
        for row in rows
    )
    content = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>"
    return f'<div class="scroll"><table>\n{content}</table></div>\n'


def base64_png(plot: Path | bytes) -> str:
    """A PNG as a data address holds it. Raises InvalidArgument if it does not exist or is not a PNG."""
    try:
        png = plot if isinstance(plot, bytes) else plot.read_bytes()
    except OSError as error:
        raise InvalidArgument(f"plots: {error.filename} cannot be read: {error.strerror}") from None
    if not png.startswith(b"\x89PNG"):
        raise InvalidArgument("plots: a plot is not a PNG image")
    return base64.b64encode(png).decode("ascii")


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))


def _is_numeric(rows: Sequence[Mapping[str, Any]], column: str) -> bool:
    return all(isinstance(row.get(column), int | float | None) for row in rows)


def _shown(value: Any) -> str:
    """A value as a person reads it: four significant digits, nothing for None."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def escaped(value: Any) -> str:
    """A value as HTML text or attribute."""
    return html.escape(_shown(value))
