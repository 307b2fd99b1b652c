"""What a comparison found on tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradpruner.compare.analysis import spread
from gradpruner.training.harness import harness_note, with_error

COLUMNS = ("method", "count", "seed", "task", "metric", "filter", "value", "stderr", "num_fewshot", "samples")
SCORES = "harness"  # the key in the file of a trained model


def task_lines(cells: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """Return every score as a line of `COLUMNS`.

    Args:
        cells: finished models. Those without scores are left out.
    """
    return [
        (
            *(cell[key] for key in ("method", "count", "seed")),
            name,
            *(metric[key] for key in ("name", "filter", "value", "stderr")),
            *(task[key] for key in ("num_fewshot", "samples")),
        )
        for cell in cells
        if cell.get(SCORES)
        for name, task in cell[SCORES]["tasks"].items()
        for metric in task["metrics"]
    ]


def task_rows(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a table with a line per method and count, and a column per task and metric.

    The count is the number of removed layers. A value is a mean over the seeds. Of one seed, it stands before lm-eval's
    standard error.

    Args:
        cells: finished models. Those without scores are left out.
    """
    groups: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for cell in cells:
        if cell.get(SCORES):
            groups.setdefault((cell["count"], cell["method"]), []).append(cell[SCORES])
    rows = []
    for (count, method), found in sorted(groups.items(), key=lambda item: item[0][0]):
        row: dict[str, Any] = {"method": method, "layers removed": count}
        for name, task in found[0]["tasks"].items():
            for index, metric in enumerate(task["metrics"]):
                title = f"{name}\n{metric['name']}" + ("" if metric["filter"] == "none" else f", {metric['filter']}")
                same = [scores["tasks"][name]["metrics"][index] for scores in found]
                row[title] = with_error(metric) if len(same) == 1 else _mean([each["value"] for each in same])
        row["seeds"] = len(found)
        rows.append(row)
    return rows


def task_note(cells: Sequence[Mapping[str, Any]]) -> str:
    """Return what must be known to read the table of `task_rows` right; "" without scores."""
    found = {f"{c['method']}, {c['count']} removed, seed {c['seed']}": c[SCORES] for c in cells if c.get(SCORES)}
    if not found:
        return ""
    several = " Of several seeds, it is the standard deviation over the seeds." if _has_seeds(cells) else ""
    return harness_note(found) + several


def _has_seeds(cells: Sequence[Mapping[str, Any]]) -> bool:
    return len({cell["seed"] for cell in cells if cell.get(SCORES)}) > 1


def _mean(values: Sequence[Any]) -> str:
    found = spread(values)
    if found is None:
        return ""
    deviation = "" if found.deviation is None else f" ± {found.deviation:.3f}"
    return f"{found.mean:.3f}{deviation}"
