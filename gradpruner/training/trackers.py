"""Report trainings to TensorBoard, Weights & Biases, MLflow, trackio and other trackers.

Each training of a run is a run of its own in the tracker, so that their curves lie over each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradpruner.distributed.launch import launched_rank
from gradpruner.plan import Plan, gaps
from gradpruner.probe.igia import Igia
from gradpruner.pruning.patch import Patch
from gradpruner.training.recipe import Recipe

if TYPE_CHECKING:
    from gradpruner.training.tracker_callback import Reporting

LOGS = "logs"  # in the folder of a run: one folder per training, for trackers that write files


@dataclass(frozen=True)
class Tracker:
    """What one training reports to. Without trackers, it does nothing.

    Args:
        reporting: the callback of the training, or None.
    """

    reporting: Reporting | None = None

    @property
    def callbacks(self) -> list[Any]:
        """What the Trainer needs: nothing, or one callback."""
        return [] if self.reporting is None else [self.reporting]

    def log(self, figures: Mapping[str, Any]) -> None:
        """Report numbers at the present step. Other values are left out."""
        if self.reporting is not None:
            self.reporting.log({k: v for k, v in figures.items() if type(v) in (int, float)})


@contextlib.contextmanager
def tracked(recipe: Recipe, logs: Path, stage: str, *, name: str = "", first_step: int = 0) -> Iterator[Tracker]:
    """Report what happens inside the block to the trackers of a recipe, as one run of theirs.

    Args:
        recipe: `report_to`, `run_name` and `project` of its `trainer_arguments` say where to.
        logs: folder for trackers that write files.
        stage: the training, for example "dense".
        name: name of the whole run, where the recipe has no `run_name`.
        first_step: steps that were made before, by a probe.
    """
    trackers = reported_to(recipe)
    if not trackers or launched_rank():  # of several processes, the first reports
        yield Tracker()
        return
    from gradpruner.training.tracker_callback import Reporting  # slow: transformers.Trainer

    reporting = Reporting(
        trackers,
        logs / stage,
        run_name=str(recipe.trainer_arguments.get("run_name") or name or "gradpruner"),
        stage=stage,
        first_step=first_step,
        arguments=recipe.trainer_arguments,
    )
    try:
        yield Tracker(reporting)
    finally:
        reporting.close()


def reported_to(recipe: Recipe) -> list[str]:
    """Return the trackers that a recipe reports to."""
    given: Any = recipe.trainer_arguments.get("report_to") or []
    names: Sequence[str] = [given] if isinstance(given, str) else given
    return [] if "none" in names else list(names)


def scores_of(igia: Igia) -> dict[str, float]:
    """Return what is reported about a probe: the default score of each layer."""
    return {f"gradpruner/score/{layer:02d}": score for layer, score in enumerate(igia.layer_scores().tolist())}


def figures_of(plan: Plan, igia: Igia, patches: Sequence[Patch], *, kind: str, protect: Any = (0,)) -> dict[str, float]:
    """Return what is reported about a cut. Fates: 0 kept, 1 dropped, 2 merged.

    Args:
        plan: which layers are removed.
        igia: what the probe saw.
        patches: of the gaps.
        kind: the layer score.
        protect: layers that are never removed. Default: the first.
    """
    figures = {
        "gradpruner/removed_layers": float(len(plan.removed)),
        "gradpruner/layer_ratio": plan.layer_ratio,
        "gradpruner/parameter_ratio": plan.parameter_ratio or 0.0,
        "gradpruner/margin": igia.margin(plan, kind, protect=protect),
        "gradpruner/gaps": float(len(gaps(plan))),
        "gradpruner/patched_gaps": float(len(patches)),
    }
    figures |= {f"gradpruner/unexplained/{patch.weight.layer:02d}": patch.unexplained for patch in patches}
    fate = {**dict.fromkeys(plan.kept, 0.0), **dict.fromkeys(plan.drop, 1.0), **dict.fromkeys(plan.merge, 2.0)}
    for layer, score in enumerate(igia.layer_scores(kind).tolist()):
        figures[f"gradpruner/watched/{layer:02d}"] = igia.watched[layer]
        figures[f"gradpruner/score/{layer:02d}"] = score
        figures[f"gradpruner/fate/{layer:02d}"] = fate[layer]
    return figures
