"""The rows of all parts as report.json, CSV files and plots, written anew after every part."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradpruner.storage.csv_files import write_dicts
from gradpruner.storage.files import atomic_path, write_json

Row = Mapping[str, Any]
OURS, THEIRS = "#0072B2", "#E69F00"


def read_rows(path: Path) -> list[Row]:
    """All rows so far. A line that a killed process has left unfinished is not one."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            rows.append({"part": "unreadable", "line": line[:200]})
    return rows


def write_report(folder: Path, rows: Sequence[Row], outcomes: Mapping[str, Any]) -> None:
    """report.json, a CSV file of the kernels, and every plot for which there are rows."""
    write_json(folder / "report.json", {"outcomes": dict(outcomes), "rows": list(rows)})
    of_kernels = [row for row in rows if row["part"] == "kernels"]
    if of_kernels:
        write_dicts(folder / "kernels.csv", of_kernels)
    for name, draw in (("kernels", _kernels), ("training", _training), ("sweep", _sweep), ("accuracy", _accuracy)):
        found = [row for row in rows if row["part"] == name]
        if found:
            _plot(folder / f"{name}.svg", draw, found)


def _plot(path: Path, draw: Any, rows: Sequence[Row]) -> None:
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:  # the numbers are in report.json all the same
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasSVG(figure)
    if draw(figure.add_subplot(), rows):  # False: what it draws is not among the rows yet
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="svg")


def _kernels(axes: Any, rows: Sequence[Row]) -> bool:
    """Device time of ours and of the best way in plain torch, a pair of bars per row."""
    best: dict[tuple[str, bool], float] = {}
    for row in rows:
        if row.get("kind") in ("ours", "torch", "released") and not row["error"]:
            key = (f"{row['op']}, {row['variant']}", row["kind"] == "ours")
            best[key] = min(best.get(key, float("inf")), row["device_s"])
    named = [name for name, ours in best if ours]
    for at, name in enumerate(named):
        for ours, color, shift in ((True, OURS, -0.2), (False, THEIRS, 0.2)):
            if (name, ours) in best:
                label = ("this package" if ours else "best in plain torch") if at == 0 else None
                axes.barh(at + shift, 1e6 * best[name, ours], 0.4, color=color, label=label)
    if not named:
        return False
    axes.set_yticks(range(len(named)), named, fontsize=6)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("microseconds on the device")
    axes.legend()
    return True


def _training(axes: Any, rows: Sequence[Row]) -> bool:
    """The costs of the pruned model as shares of the dense one's."""
    shares = next((row for row in rows if row.get("model") == "pruned / dense"), None)
    if shares is None:
        return False
    named = {name: value for name, value in shares.items() if isinstance(value, float)}
    axes.barh(list(named), list(named.values()), color=OURS)
    axes.axvline(1.0, color="gray", linewidth=1)
    for name, value in named.items():
        axes.text(value, name, f" {value:.2f}", va="center")
    axes.invert_yaxis()
    axes.set_xlabel("of the dense model's")
    return bool(named)


def _sweep(axes: Any, rows: Sequence[Row]) -> bool:
    """Step time and memory over the share of layers removed."""
    found = [row for row in rows if "removed_share" in row]
    if len(found) < 2:
        return False
    dense = found[0]
    for name, label in (
        ("step_s", "training step"),
        ("train_peak_bytes", "training memory"),
        ("generate_s", "generation"),
    ):
        if dense.get(name):
            axes.plot([r["removed_share"] for r in found], [r[name] / dense[name] for r in found], "o-", label=label)
    axes.set_xlabel("share of the layers removed")
    axes.set_ylabel("of the dense model's")
    axes.set_ylim(bottom=0)
    axes.legend()
    return True


def _accuracy(axes: Any, rows: Sequence[Row]) -> bool:
    """Exact match of every model, dense and pruned side by side for each seed."""
    found = [row for row in rows if row.get("what") == "model"]
    for model, color in zip(dict.fromkeys(row["model"] for row in found), (THEIRS, OURS), strict=False):
        own = [row for row in found if row["model"] == model]
        shift = -0.2 if color == THEIRS else 0.2
        axes.bar(
            [row["seed"] + shift for row in own],
            [row["exact_match"] for row in own],
            0.4,
            color=color,
            label=model.partition(":")[0],
        )
    axes.set_xlabel("seed")
    axes.set_ylabel("exact match")
    axes.legend(loc="lower right")
    return bool(found)
