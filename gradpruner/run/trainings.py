"""Trains and evaluates the models of a run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from gradpruner.checkpoint.save import save
from gradpruner.data.examples import Example
from gradpruner.model.decoder import Decoder
from gradpruner.model.load import Loaded
from gradpruner.plan import Plan
from gradpruner.run.folder import RunFolder
from gradpruner.run.job import Job
from gradpruner.run.models import RunModels
from gradpruner.run.stages import tune
from gradpruner.training.divergence import why_failed
from gradpruner.training.evaluate import Evaluation
from gradpruner.training.schedule import Row
from gradpruner.training.trackers import LOGS, Tracker, tracked

logger = logging.getLogger(__name__)


class Trainings:
    """Trains and evaluates the models of one run, and reports each training to the trackers.

    Args:
        job: the settings of the run.
        models: its models.
        stages: its folder.
        quiet: whether to show no progress bars.
    """

    def __init__(self, job: Job, models: RunModels, stages: RunFolder, *, quiet: bool) -> None:
        self.job, self.quiet = job, quiet
        self._models, self._stages = models, stages

    def tracked(self, stage: str, first_step: int = 0) -> contextlib.AbstractContextManager[Tracker]:
        """Report a stage to the trackers of the recipe.

        Args:
            stage: its name.
            first_step: steps that were made before, by the probe.
        """
        folder = self._stages.path
        return tracked(self.job.recipe, folder / LOGS, stage, name=folder.resolve().name, first_step=first_step)

    def _base(self, loaded: Loaded) -> Any:
        """Return the model that adapters trained beside 4-bit weights are added to, or None."""
        return loaded.model if self.job.load_in_4bit else None

    def trial(
        self, name: str, loaded: Loaded, widening: int, held_out: Sequence[Example], made_from: Mapping[str, str]
    ) -> Evaluation:
        """Train a cut that is tried, on the rows after those of the probe, and evaluate it.

        Args:
            name: of the trial.
            loaded: the model that is tried, and its tokenizer.
            widening: the factor of the rank of its adapters.
            held_out: what it is evaluated on.
            made_from: digests of what the trial is made from.
        """
        (model, tokenizer), base = self._models.packed(loaded), self._base(loaded)
        size = self.job.recipe.rows_per_step
        rows = self._models.rows(tokenizer)[self.job.probing * size : (self.job.probing + self.job.checking) * size]
        checkpoints = self._stages.checkpoints(f"check-{name}", made_from)
        with self.tracked(f"auto-{name}", self.job.probing) as tracker:
            model, _ = tune(
                model,
                tokenizer,
                rows,
                self.job.recipe.widened(widening),
                quiet=self.quiet,
                checkpoints=checkpoints,
                callbacks=tracker.callbacks,
                base=base,
            )
            evaluation, _ = self._models.score(model, tokenizer, held_out)
            tracker.log({f"eval_{measure}": value for measure, value in evaluation.to_dict().items()})
        checkpoints.discard()
        return evaluation

    def fine_tune(
        self,
        name: str,
        loaded: Loaded,
        rows: Sequence[Row],
        test: Sequence[Example],
        folder: str,
        made_from: Mapping[str, str],
        plan: Plan | None = None,
        *,
        source: str,
    ) -> dict[str, Any]:
        """Fine-tune, save and evaluate one model.

        Args:
            name: "dense" or "pruned".
            loaded: the model and its tokenizer.
            rows: what it is trained on, in order.
            test: what it is evaluated on.
            folder: its name in the folder of the run.
            made_from: digests of what the training is made from.
            plan: which layers the model lacks. Default: it is the dense model.
            source: what the model was loaded from: the job's model, or a folder of the run.

        Returns:
            Its row of the results.
        """
        (model, tokenizer), base = self._models.packed(loaded, source), self._base(loaded)
        recipe = self.job.recipe.widened(1 if plan is None else self.job.preset.rank_factor)
        checkpoints = self._stages.checkpoints(name, made_from)
        with self.tracked(name, 0 if plan is None else self.job.probing) as tracker:
            model, training = tune(
                model,
                tokenizer,
                rows,
                recipe,
                quiet=self.quiet,
                checkpoints=checkpoints,
                callbacks=tracker.callbacks,
                base=base,
            )
            logger.info(f"{name}: evaluating {len(test)} examples")
            saved = save(
                model,
                self._stages.path / folder,
                tokenizer=tokenizer,
                plan=plan,
                overwrite=True,
                beside=lambda inside: self._models.carry_processor(model, inside),
            )
            evaluation, sets = self._models.score(model, tokenizer, test)
            tracker.log({f"test_{measure}": value for measure, value in evaluation.to_dict().items()})
            for one in sets:
                tracker.log({f"test_{one['name']}_{measure}": one[measure] for measure in evaluation.to_dict()})
        decoder = Decoder(model)
        return {
            "name": name,
            "layers": len(decoder.layers),
            "parameters": decoder.total_parameters(),
            **evaluation.to_dict(),
            **({"test_sets": sets} if sets else {}),
            "step_seconds": training.step_seconds,
            "peak_bytes": training.peak_bytes,
            "checkpoint_bytes": sum(f.stat().st_size for f in saved.glob("*.safetensors")),
            "failed": why_failed(f"the {name} run", training.losses, evaluation.perplexity),
            "training": training.to_dict(),
        }
