"""What a comparison found, as CSV files, a table and a page: written anew from its folder at any time."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradpruner.bootstrap import paired_difference
from gradpruner.compare import DENSE, Compare
from gradpruner.comparison_report import write_comparison
from gradpruner.costs import measure
from gradpruner.files import atomic_path
from gradpruner.methods import GradPruner, parse_method, spelled
from gradpruner.plan import Plan
from gradpruner.report import table
from gradpruner.results import Cost, Result, read_costs, write_costs, write_results
from gradpruner.sensitivity import scored

OURS = spelled(GradPruner())


def write(comparison: Compare, *, costs: bool, sensitivity: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Write results.csv, losses.csv, differences.csv, costs.csv (measured now if `costs`) and report.html.

    sensitivity: rows of `gradpruner.sensitivity.variants` whose methods are those of the comparison. Returns what the
    command prints: a table, and the same as JSON.
    """
    folder, found = comparison.folder, comparison.finished()
    results = [_result(comparison, cell) for cell in found]
    losses = {(c["method"], c["count"], c["seed"]): c["training"]["losses"] for c in found}
    differences = _differences(found)
    write_results(folder / "results.csv", results)
    _write_rows(folder / "losses.csv", ("method", "count", "seed", "step", "loss"), [
        (*key, step, loss) for key, values in losses.items() for step, loss in enumerate(values, 1)
    ])  # fmt: skip
    _write_rows(folder / "differences.csv", ("method", "count", "difference", "low", "high"),
                [tuple(row.values()) for row in differences])  # fmt: skip
    measured = _costs(comparison, found, costs)
    page = write_comparison(
        folder, title="Which layers can go", task=_task(comparison), results=results, losses=losses, costs=measured,
        differences=differences, probe=_probe(comparison, found),
        sensitivity=scored(sensitivity, results), notes=_notes(comparison),
    )  # fmt: skip
    rows = _rows(results, differences)
    return {"json": {"rows": rows, "report": str(page)}, "line": f"{table(rows)}\n\nreport: {page}"}


def _result(comparison: Compare, cell: Mapping[str, Any]) -> Result:
    training, method = cell["training"], cell["method"]
    probing = 0 if method == DENSE else comparison.job.steps - training["steps"]
    losses = training["losses"]
    return Result(
        method=method,
        count=cell["count"],
        ratio=cell["ratio"],
        seed=cell["seed"],
        exact_match=cell["exact_match"],
        macro_f1=cell["macro_f1"],
        perplexity=cell["perplexity"],
        examples=cell["examples"],
        layers=cell["layers"],
        parameters=cell["parameters"],
        removed=" ".join(map(str, cell["removed"])),
        merged=" ".join(f"{donor}>{target}" for donor, target in cell["merged"].items()),
        steps=training["steps"] + probing,
        first_loss=statistics.fmean(losses[:10]),
        last_loss=statistics.fmean(losses[-20:]),
        seconds=cell["seconds_to_cut"] + cell["training_seconds"],
    )


def _differences(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The default method against every other one, on the seeds that both have."""
    right: dict[tuple[str, int], dict[int, list[float]]] = {}
    for cell in cells:
        if cell["right"]:
            right.setdefault((cell["method"], cell["count"]), {})[cell["seed"]] = [float(c) for c in cell["right"]]
    found = []
    for (method, count), theirs in right.items():
        ours = right.get((OURS, count), {})
        seeds = sorted(ours.keys() & theirs.keys())
        if method not in (OURS, DENSE) and seeds:
            d = paired_difference([ours[s] for s in seeds], [theirs[s] for s in seeds])
            found.append({"method": method, "count": count, "difference": d.mean, "low": d.low, "high": d.high})
    return found


def _costs(comparison: Compare, cells: Sequence[Mapping[str, Any]], fresh: bool) -> list[Cost]:
    """One line for every number of layers: only that number costs, not which layers they are."""
    path, job = comparison.folder / "costs.csv", comparison.job
    if not fresh:
        return read_costs(path) if path.exists() else []
    plans = {0: None, **{c["count"]: Plan(comparison.layers(), c["removed"]) for c in cells if c["count"]}}
    loading = {"source": job.source, "dtype": job.dtype, "attention": job.attention,
               "trust_remote_code": job.trust_remote_code}  # fmt: skip
    costs = measure(loading, list(plans.values()), comparison.rows_of_dense(), job.recipe)
    write_costs(path, costs)
    return costs


def _probe(comparison: Compare, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Scores and ranking of the default method's first model."""
    for cell in cells:
        method = DENSE if cell["method"] == DENSE else parse_method(cell["method"])
        if isinstance(method, GradPruner) and cell["method"] == OURS:
            igia, plan = comparison.seen(method, cell["seed"]), comparison.plan_of(cell)
            return {
                "layer_scores": {kind: igia.layer_scores(kind).tolist() for kind in ("squared", "norm", "normalized")},
                "kind": method.settings.kind,
                "stability": igia.stability(plan, method.settings.kind),
                "plan": plan,
            }
    return None


def _task(comparison: Compare) -> str:
    job, terms = comparison.job, comparison.terms
    return (
        f"{job.source}, {terms['train_examples']} training and {terms['test_examples']} test examples, "
        f"{job.steps} steps of {job.recipe.rows_a_step}"
    )


def _notes(comparison: Compare) -> list[str]:
    job = comparison.job
    return [
        f"Every model trains on the same rows in the same order; of the {job.steps} steps a pruned model spends the "
        f"first {job.probing} on choosing (unless its name says otherwise), whether its method trains in them or not.",
        f"Fine-tuning: {job.recipe.to_dict()}.",
        "Exact match: every token of the answer, end token included, is the most likely one (one forward pass).",
        "Differences: paired bootstrap over the test examples, 95 %, runs of all seeds averaged first.",
    ]


def _rows(results: Sequence[Result], differences: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[int, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.count, result.method), []).append(result)
    against = {(d["count"], d["method"]): d for d in differences}
    dense = [r.exact_match for r in results if r.method == DENSE and r.exact_match is not None]
    rows = []
    for (count, method), group in sorted(groups.items(), key=lambda item: item[0][0]):
        scores = [r.exact_match for r in group if r.exact_match is not None]
        mean = statistics.fmean(scores) if scores else None
        d = against.get((count, method))
        rows.append({
            "layers removed": count,
            "method": method,
            "exact match": mean,
            "least": min(scores, default=None),
            "most": max(scores, default=None),
            "of dense": mean / statistics.fmean(dense) if any(dense) and mean is not None else None,
            "macro F1": statistics.fmean(r.macro_f1 for r in group) if group[0].macro_f1 is not None else None,  # type: ignore[misc]
            "perplexity": statistics.fmean(r.perplexity for r in group if r.perplexity is not None),
            "seeds": len(group),
            "ours minus it": f"{d['difference']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]" if d else "",
        })  # fmt: skip
    return [{k: v for k, v in row.items() if any(other[k] not in (None, "") for other in rows)} for row in rows]


def _write_rows(path: Path, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([names, *rows])
