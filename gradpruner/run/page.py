"""The page of one run: what is kept of the dense model, removed layers, costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gradpruner.plan import Plan
from gradpruner.probe.coverage import share_range
from gradpruner.report.pages import Picture, Tile, base64_png, write_page
from gradpruner.report.plots import (
    BLUE,
    GREY,
    INK,
    LossCurve,
    draw_losses,
    mark_probe,
    new_figure,
    plot_layer_scores,
    png_of,
)
from gradpruner.run.auto_ratio import trial_rows
from gradpruner.run.summary import comparison, notes, outcome, share_of_dense
from gradpruner.storage.files import read_json, reading
from gradpruner.training.harness import harness_note, harness_rows

REPORT, SCORES = "report.html", "layer_scores.png"
PROTECTED = 0  # the layer that no scored plan of a run removes
LOSS_STYLES: dict[str, dict[str, Any]] = {
    "dense": {"color": INK, "linewidth": 1.8},
    "pruned": {"color": BLUE, "linewidth": 3.0, "zorder": 5},
}
MEANINGS = {
    "kept": "kept: the layer stays as it is",
    "protected": "protected: kept whatever its score",
    "dropped": "dropped: the layer is removed",
    "merged": "merged: its most important entries are added to the layer after the arrow, then it is removed",
}
DECIDED = ("exact_match", "perplexity")  # of a row: what the run is judged by, the first that was measured


class LayerBox(NamedTuple):
    """One box of the strip of layers.

    Args:
        number: the layer's index in the dense model, from 0.
        fate: what became of it, a key of `MEANINGS` and a class of the style sheet.
        sign: a few characters for the box.
        says: the same in words, for those who cannot see the box.
    """

    number: int
    fate: str
    sign: str
    says: str

    @property
    def meaning(self) -> str:
        """What the legend says beside such a box."""
        return MEANINGS[self.fate]


def write_report(folder: Path) -> Path:
    """Draw layer_scores.png and write report.html from the results.json and run.json of a run.

    Args:
        folder: the folder of a finished run. A folder whose results hold no losses gets a page without their plot.

    Returns:
        The path of the page.

    Raises:
        InvalidArgument: the folder holds no results.json.
        CheckpointError: results.json or run.json is damaged.
    """
    with reading(str(folder / "results.json")):
        return _write(folder)


def _write(folder: Path) -> Path:
    results, settings = read_json(folder / "results.json", "results"), read_json(folder / "run.json", "run")
    plan, probe, rows = Plan.from_dict(results["plan"]), results["probe"], results["rows"]
    auto = results.get("auto")
    plot_layer_scores(probe["layer_scores"], plan, folder / SCORES)
    layers = _layer_boxes(plan)
    trials = trial_rows(auto) if auto else []
    write_page(
        folder / REPORT,
        "run/templates/run.html",
        title=f"{Path(str(settings['source'])).name or settings['source']}, pruned",
        task=_task(settings),
        answer=outcome(rows, plan),
        failures=[row["failed"] for row in rows if row.get("failed")],
        figures=_figures(rows, plan),
        layers=layers,
        legend=[next(layer for layer in layers if layer.fate == fate) for fate in _fates(layers)],
        scores=Picture(base64_png(folder / SCORES), f"Bars of every decoder layer's score. The plan {plan.summary()}."),
        scores_note=_scores_note(plan),
        score_rows=[
            {"layer": str(layer.number), "score": float(score), "outcome": layer.says}
            for layer, score in zip(layers, probe["layer_scores"], strict=True)
        ],
        losses=_losses(rows, settings["steps"]),
        results_title="Dense and pruned" if len(rows) > 1 else "The pruned model",
        results=comparison(rows),
        results_note=notes(rows),
        tasks=harness_rows(results["harness"]) if "harness" in results else [],
        tasks_note=harness_note(results["harness"]) if "harness" in results else "",
        trials=trials,
        trials_reason=auto["reason"] if auto else "",
        trials_chosen=next((row["layers removed"] for row in trials if row[""]), None),
        probe=_probe(probe, settings),
        settings=_settings(settings, plan),
    )
    return folder / REPORT


def _task(settings: Mapping[str, Any]) -> str:
    """Return one line on model, data and steps; of an older folder, only what it has recorded."""
    parts = [str(settings["source"])]
    if "train_examples" in settings:
        parts.append(f"{settings['train_examples']} training and {settings['test_examples']} test examples")
    recipe = settings.get("recipe")
    size = f" of {recipe['batch_size'] * recipe['accumulation']}" if recipe else ""
    return ", ".join([*parts, f"{settings['steps']} steps{size}"])


def _figures(rows: Sequence[Mapping[str, Any]], plan: Plan) -> list[Tile]:
    """Return the key figures, accuracy first."""
    pruned, dense = rows[-1], rows[0] if len(rows) > 1 else None
    figures = []
    for field, digits in zip(DECIDED, (3, 2), strict=True):
        if pruned[field] is not None:
            beside = "" if dense is None or dense[field] is None else f"dense {dense[field]:.{digits}f}"
            figures.append(Tile(field.replace("_", " "), f"{pruned[field]:.{digits}f}", beside))
    removed = f"{plan.layer_ratio * 100:.0f} % removed"
    figures.append(Tile("decoder layers left", f"{len(plan.kept)} of {plan.layers}", removed))
    if dense is None:
        return [*figures, Tile("parameters left", f"{pruned['parameters'] / 1e6:.3g} M")]
    share = f"{pruned['parameters'] / dense['parameters'] * 100:.0f} % of dense"
    figures.append(Tile("parameters left", f"{pruned['parameters'] / 1e6:.3g} M", share))
    for name, field in (
        ("training step time", "step_seconds"),
        ("training memory", "peak_bytes"),
        ("generation speed", "tokens_per_second"),
        ("checkpoint size", "checkpoint_bytes"),
    ):
        ratio = share_of_dense(field, dense, pruned)
        if ratio is not None:
            figures.append(Tile(name, f"{ratio:.2f}", "of dense"))
    return figures


def _layer_boxes(plan: Plan) -> list[LayerBox]:
    assert isinstance(plan.merge, Mapping)
    boxes = []
    for layer in range(plan.layers):
        if layer in plan.drop:
            boxes.append(LayerBox(layer, "dropped", "×", "dropped"))
        elif layer in plan.merge:
            target = plan.merge[layer]
            boxes.append(LayerBox(layer, "merged", f"→{target}", f"merged into layer {target}, then removed"))
        elif layer == PROTECTED and plan.kind is not None:
            boxes.append(LayerBox(layer, "protected", "kept", "kept, protected"))
        else:
            boxes.append(LayerBox(layer, "kept", "kept", "kept"))
    return boxes


def _fates(layers: Sequence[LayerBox]) -> list[str]:
    """Return the fates that occur, in the order of the legend."""
    return [fate for fate in MEANINGS if any(layer.fate == fate for layer in layers)]


def _scores_note(plan: Plan) -> str:
    if plan.kind is None:
        return "The plan was written by hand: its layers are removed, whatever their scores."
    return f"The layers with the lowest scores ({plan.kind}) are removed. The axis is logarithmic."


def _losses(rows: Sequence[Mapping[str, Any]], steps: int) -> Picture | None:
    """Return the plot of the losses with the cut marked, None where the results hold no losses."""
    curves = {}
    for row in rows:
        losses = [float(loss) for loss in row.get("training", {}).get("losses", ())]
        if losses:
            curves[row["name"]] = LossCurve(max(0, steps - len(losses)), losses)
    if not curves or not any(math.isfinite(loss) and loss > 0 for curve in curves.values() for loss in curve.values):
        return None
    figure = new_figure(9.6, 4.2)
    axes = figure.add_subplot()
    draw_losses(axes, curves, LOSS_STYLES)
    cut = curves["pruned"].start if "pruned" in curves else 0
    if cut:
        mark_probe(axes, cut)
        axes.axvline(cut, color=GREY, linewidth=1.4, linestyle=(0, (2, 2)), label="cut")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=12)
    ends = ", ".join(f"{name} {curve.values[-1]:.3g}" for name, curve in curves.items())
    where = f" The cut is after step {cut}." if cut else ""
    says = f"Line plot of the training loss against optimizer steps.{where} At the last step: {ends}."
    return Picture(base64_png(png_of(figure)), says)


def _probe(probe: Mapping[str, Any], settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    stability = probe["stability"]
    facts = [
        ("steps", f"{settings['probe_steps']} of {settings['steps']}; the pruned model trains in the others"),
        ("margin at the cut", f"{probe['margin']:.3f}"),
        ("removed layers settled after half of the probe", f"{stability[(len(stability) - 1) // 2]:.0%}"),
    ]
    if "watched" in probe:
        facts.append(("watched of each layer's parameters", share_range(probe["watched"])))
    if probe.get("skipped"):
        facts.append(("steps left out, with gradients that are not finite", str(probe["skipped"])))
    return facts


def _settings(settings: Mapping[str, Any], plan: Plan) -> list[tuple[str, str]]:
    """Return the settings as names and values, those that are empty left out."""
    apart = {"source", "model", "data", "recipe", "steps", "preset", "command"}
    preset, recipe, model = settings.get("preset"), settings.get("recipe"), settings.get("model")
    facts = [("model", str(settings["source"])), ("plan", plan.summary())]
    if isinstance(preset, Mapping):
        facts.append(("preset", _listed(preset)))
    elif preset is not None:
        facts.append(("preset", str(preset)))
    facts += [(_words(name), str(value)) for name, value in settings.items() if name not in apart and value is not None]
    if recipe is not None:
        facts.append(("fine-tuning", _listed(recipe)))
    if "data" in settings:
        facts.append(("data, digest", str(settings["data"])))
    if isinstance(model, Mapping) and isinstance(model.get("versions"), Mapping):
        facts.append(("versions", ", ".join(f"{name} {version}" for name, version in model["versions"].items())))
    return facts


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{_words(name)} {value}" for name, value in values.items())


def _words(name: str) -> str:
    return str(name).replace("_", " ")
