"""Write what a comparison found, from its folder: CSV files, a table and a page."""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradpruner.compare.analysis import DENSE, Differences, spread
from gradpruner.compare.bootstrap import Difference, paired_difference
from gradpruner.compare.cells import OURS, Cell, finished
from gradpruner.compare.costs import measure
from gradpruner.compare.experiment import SETTINGS, Compare
from gradpruner.compare.page import write_comparison
from gradpruner.compare.results import Result, read_costs, write_costs, write_results
from gradpruner.compare.sensitivity import scored
from gradpruner.compare.task_scores import COLUMNS as TASK_COLUMNS
from gradpruner.compare.task_scores import task_lines, task_note, task_rows
from gradpruner.distributed.processes import first
from gradpruner.errors import InvalidArgument, ProbeError
from gradpruner.methods import GradPruner
from gradpruner.plan import Plan
from gradpruner.probe.igia import SCORES, Igia
from gradpruner.probe.selection import how_many
from gradpruner.report.tables import table
from gradpruner.run.probe_folder import IGIA
from gradpruner.storage.csv_files import write_lines
from gradpruner.storage.files import read_json, reading, write_json
from gradpruner.storage.locks import claim, holder, lock
from gradpruner.training.divergence import why_failed

logger = logging.getLogger(__name__)


def write(comparison: Compare, *, costs: bool, sensitivity: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Write results.csv, losses.csv, differences.csv, costs.csv and report.html.

    Args:
        comparison: a comparison with at least one finished model.
        costs: measure the models' costs now and write costs.csv.
        sensitivity: rows of `gradpruner.compare.sensitivity.variants` whose methods are those of the comparison.

    Returns:
        What the command prints: "line", a table as text; "json", the same for programs; "failed", sentences on the
        runs that are no success.

    Raises:
        InvalidArgument: no model is finished, or matplotlib is missing.
        CheckpointError: a file is damaged or cannot be written.
    """
    return first(lambda: _written(comparison, costs, sensitivity))


def _written(comparison: Compare, costs: bool, sensitivity: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Do what `write` says, in one process at a time: each process that finishes may write."""
    place = comparison.folder / "locks" / "report"
    with claim(place) as free:  # whoever comes while another one measures the costs need not measure them again
        if free:
            return _written_alone(comparison, costs, sensitivity)
    logger.info(f"the report: {holder(place) or 'another process'} is writing it; waiting")
    with lock(place):
        return _written_alone(comparison, costs and not (comparison.folder / "costs.csv").exists(), sensitivity)


def _written_alone(comparison: Compare, costs: bool, sensitivity: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if sensitivity:
        count = how_many(comparison.layers(), comparison.ratios[0])
        tried = {"rows": list(sensitivity), "count": count, "seeds": list(comparison.seeds)}
        write_json(comparison.folder / "sensitivity.json", tried)
    if costs:
        rewrite(comparison.folder)  # costs that cannot be measured do not keep the results from being written
        _measure(comparison)
    return rewrite(comparison.folder)


def rewrite(folder: Path) -> dict[str, Any]:
    """Write the files of `write` again, of every finished model in the folder of a comparison.

    Args:
        folder: the folder. Costs and sensitivity are taken from costs.csv and sensitivity.json, if they are there.

    Returns:
        What `write` returns.

    Raises:
        InvalidArgument: it is not the folder of a comparison, or no model in it is finished.
        CheckpointError: a file in it is damaged.
    """
    with reading(str(folder)):
        return _rewritten(folder)


def _rewritten(folder: Path) -> dict[str, Any]:
    terms, cells = read_json(folder / SETTINGS, "comparison"), finished(folder)
    if not cells:
        raise InvalidArgument(f"folder {str(folder)!r} holds no finished model of a comparison")
    results = [_result(terms, cell) for cell in cells]
    losses = {(c["method"], c["count"], c["seed"]): c["training"]["losses"] for c in cells}
    differences = _differences(cells)
    # 1. files for programs
    write_results(folder / "results.csv", results)
    write_lines(
        folder / "losses.csv",
        ("method", "count", "seed", "step", "loss"),
        [(*key, step, loss) for key, values in losses.items() for step, loss in enumerate(values, 1)],
    )
    write_lines(
        folder / "differences.csv",
        ("method", "count", "difference", "low", "high"),
        [(*key, difference.mean, difference.low, difference.high) for key, difference in differences.items()],
    )
    tasks = task_rows(cells)
    if tasks:
        write_lines(folder / "tasks.csv", TASK_COLUMNS, task_lines(cells))
    # 2. the page
    costs, tried = folder / "costs.csv", folder / "sensitivity.json"
    sensitivity = scored(read_json(tried, "sensitivity"), results) if tried.exists() else []
    apart, failed = _shown_apart(results, sensitivity), _failures(cells)
    page = write_comparison(
        folder,
        title="Which layers can be removed",
        task=_task(terms),
        results=[result for result in results if result.method not in apart],
        losses={key: values for key, values in losses.items() if key[0] not in apart},
        costs=read_costs(costs) if costs.exists() else [],
        differences={key: difference for key, difference in differences.items() if key[0] not in apart},
        probe=_probe(folder, cells),
        sensitivity=sensitivity,
        tasks=tasks,
        tasks_note=task_note(cells),
        notes=[*failed, *_notes(terms)],
    )
    # 3. what the command prints
    rows = _rows(results, differences)
    shown = [table(rows), *([table(tasks), task_note(cells)] if tasks else [])]
    line = "\n\n".join([*shown, *failed, f"report: {page}"])
    return {
        "json": {"rows": rows, "tasks": tasks, "failed": failed, "report": str(page)},
        "line": line,
        "failed": " ".join(failed),
    }


def _failures(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence on every model whose training was no success."""
    sentences = []
    for cell in cells:
        title = Cell(cell["method"], cell["count"], cell["seed"]).title
        why = why_failed(f"the run of {title},", cell["training"]["losses"], cell["perplexity"])
        if why:
            sentences.append(why)
    return sentences


def _shown_apart(results: Sequence[Result], sensitivity: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the methods that the page shows only as values of a setting.

    There are none where the default method, which they belong to, was not run.
    """
    if not any(result.method == OURS for result in results):
        return set()
    return {row["method"] for row in sensitivity if not row["is_default"]}


def _result(terms: Mapping[str, Any], cell: Mapping[str, Any]) -> Result:
    training, method = cell["training"], cell["method"]
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
        steps=terms["steps"],
        first_loss=statistics.fmean(losses[:10]),
        last_loss=statistics.fmean(losses[-20:]),
        seconds=cell["seconds_to_cut"] + cell["training_seconds"],
    )


def _differences(cells: Sequence[Mapping[str, Any]]) -> Differences:
    """Return the default method against every other one, on the seeds that both have."""
    right: dict[tuple[str, int], dict[int, list[float]]] = {}
    for cell in cells:
        if cell["right"]:
            right.setdefault((cell["method"], cell["count"]), {})[cell["seed"]] = [float(c) for c in cell["right"]]
    differences: dict[tuple[str, int], Difference] = {}
    for (method, count), theirs in right.items():
        ours = right.get((OURS, count), {})
        seeds = sorted(ours.keys() & theirs.keys())
        if method not in (OURS, DENSE) and seeds:
            differences[method, count] = paired_difference([ours[s] for s in seeds], [theirs[s] for s in seeds])
    return differences


def _measure(comparison: Compare) -> None:
    """Measure one model per number of removed layers.

    The costs do not depend on which layers they are.
    """
    job, layers = comparison.job, comparison.layers()
    plans = {c["count"]: Plan(layers, c["removed"]) if c["count"] else None for c in finished(comparison.folder)}
    loading = {
        "source": job.source,
        "dtype": job.dtype,
        "attention": job.attention,
        "trust_remote_code": job.trust_remote_code,
        "revision": comparison.revision,
    }
    costs = measure(
        loading,
        list(plans.values()),
        comparison.rows_of_dense(),
        job.recipe,
        beside=comparison.folder,
        rank_factor=GradPruner().settings.rank_factor,
    )
    write_costs(comparison.folder / "costs.csv", costs)


def _probe(folder: Path, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return what the probe of one model of the default method found.

    It is a model with the number of removed layers that was run most often.
    """
    ours = [c for c in cells if c["method"] == OURS and (folder / "probes" / c.get("probe", "-") / IGIA).is_file()]
    if not ours:
        return None
    counts = Counter(cell["count"] for cell in ours)
    cell = max(ours, key=lambda c: (counts[c["count"]], -c["seed"]))
    igia, kind = Igia.load(folder / "probes" / cell["probe"] / IGIA, lazy=True), GradPruner().settings.kind
    plan = Plan(
        igia.layers,
        [j for j in cell["removed"] if str(j) not in cell["merged"]],
        {int(donor): target for donor, target in cell["merged"].items()},
        watched=min(igia.watched[1:], default=None),
    )
    try:
        stability = igia.stability(plan, kind)
    except ProbeError as error:  # the comparison was made before such a plan was refused
        logger.warning(f"the layer scores are left out of the report: {error}")
        return None
    return {
        "layer_scores": {each: igia.layer_scores(each).tolist() for each in SCORES},
        "kind": kind,
        "stability": stability,
        "plan": plan,
    }


def _task(terms: Mapping[str, Any]) -> str:
    return (
        f"{terms['source']}, {terms['train_examples']} training and {terms['test_examples']} test examples, "
        f"{terms['steps']} steps of {terms['recipe']['batch_size'] * terms['recipe']['accumulation']}"
    )


def _notes(terms: Mapping[str, Any]) -> list[str]:
    recipe = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in terms["recipe"].items() if name != "seed")
    return [
        f"Every model trains on the same rows in the same order; of the {terms['steps']} steps a pruned model spends "
        f"the first {terms['probe_steps']} on choosing (unless its name says otherwise), whether its method trains in "
        "them or not.",
        f"Fine-tuning: {recipe}.",
        "Exact match: every token of the answer, end token included, is the most likely one (one forward pass).",
        "Differences: paired bootstrap over the test examples, 95 %, runs of all seeds averaged first.",
    ]


def _rows(results: Sequence[Result], differences: Differences) -> list[dict[str, Any]]:
    """Return the table that the command prints, columns without any value left out."""
    groups: dict[tuple[int, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.count, result.method), []).append(result)
    dense = {r.seed: r.exact_match for r in results if r.method == DENSE and r.exact_match is not None}
    rows = []
    for (count, method), group in sorted(groups.items(), key=lambda item: item[0][0]):
        match, f1 = spread(r.exact_match for r in group), spread(r.macro_f1 for r in group)
        perplexity = spread(r.perplexity for r in group)
        beside = spread(dense[r.seed] for r in group if r.seed in dense)  # the same seeds
        rows.append(
            {
                "layers removed": count,
                "method": method,
                "exact match": match and match.mean,
                "least": match and match.low,
                "most": match and match.high,
                "of dense": match.mean / beside.mean if match and beside and beside.mean else None,
                "macro F1": f1 and f1.mean,
                "perplexity": perplexity and perplexity.mean,
                "seeds": len(group),
                "ours minus it": _interval(differences.get((method, count))),
            }
        )
    return [{k: v for k, v in row.items() if any(other[k] not in (None, "") for other in rows)} for row in rows]


def _interval(difference: Difference | None) -> str:
    if difference is None:
        return ""
    return f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
