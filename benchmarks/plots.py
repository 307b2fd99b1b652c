"""Bars of times on a logarithmic axis, drawn from the CSV alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from benchmarks.records import Result, read
from gradpruner.errors import InvalidArgument
from gradpruner.storage.files import atomic_path

# Okabe and Ito's palette, as in the reports
COLOURS = {"ours": "#0072B2", "best torch": "#E69F00", "released": "#D9D9D9", "limit": "#1b1f24"}


def blank(width: float, height: float) -> Any:
    """An empty matplotlib figure, in inches. Raises InvalidArgument if matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure  # not pyplot, whose state belongs to the caller
    except ImportError:
        raise InvalidArgument("a plot needs matplotlib: pip install gradpruner[plot]") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path) -> None:
    """Write an SVG whose bytes depend on what it shows alone. Raises CheckpointError if the disk is full."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "gradpruner"}), atomic_path(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def plot(csv_path: str | os.PathLike[str]) -> list[Path]:
    """One SVG an op beside the CSV: ours, the best torch way, the released way, the limit. Returns their paths.

    Raises InvalidArgument if matplotlib or the CSV is missing, CheckpointError if it cannot be read.
    """
    source, drawn = Path(csv_path), []
    found = [each for each in read(source, Result) if not each.error]
    for op in dict.fromkeys(each.op for each in found):
        rows = {each.row: _bars(each.row, found) for each in found if each.op == op}
        figure = blank(9.6, 1.4 + 0.8 * len(rows))
        axes = figure.add_subplot()
        for n, name in enumerate(COLOURS):
            at = [(i + 0.2 * n, bars[name]) for i, bars in enumerate(rows.values()) if name in bars]
            axes.barh([y for y, _ in at], [t for _, t in at], height=0.2, color=COLOURS[name], label=name)
        axes.set_yticks([i + 0.3 for i in range(len(rows))], [f"{shape}\n{variant}" for _, shape, variant in rows])
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlim(left=min(time for bars in rows.values() for time in bars.values()) / 3)
        axes.set_xlabel("seconds (shorter is better)")
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"{op}: {found[0].machine}, {found[0].threads} threads, torch {found[0].torch}")
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
        path = source.with_name(f"{source.stem}-{op.strip('_')}.svg")
        save(figure, path)
        drawn.append(path)
    return drawn


def _bars(row: tuple[str, str, str], found: list[Result]) -> dict[str, float]:
    """Bar name to seconds."""
    here = [each for each in found if each.row == row]
    times = {kind: [each.median_s for each in here if each.kind == kind] for kind in ("ours", "released", "torch")}
    best = times["torch"] + times["released"]
    bars = {"limit": here[0].limit_s}
    if times["ours"]:
        bars["ours"] = times["ours"][0]
    if best:
        bars["best torch"] = min(best)
    if times["released"]:
        bars["released"] = times["released"][0]
    return bars
