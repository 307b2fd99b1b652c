"""A whole run, stage by stage: probe, plan, dense run, cut, fine-tune, evaluate, report.

Every stage reads the files of those before it and writes its own last, so a run that was stopped goes on from the
first stage whose file is missing. Every stage's file records what it was made from, and a file that was made from
something else is refused. A stage that trains goes on from its newest checkpoint.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradpruner.checkpoint.card import model_card, write_card
from gradpruner.checkpoint.companions import plan_of
from gradpruner.checkpoint.save import PLAN_FILE, save
from gradpruner.data.examples import Example, digest_of_examples
from gradpruner.distributed.agreement import take_weights_of_first
from gradpruner.distributed.launch import join, launched
from gradpruner.distributed.processes import alone, first
from gradpruner.errors import InvalidArgument
from gradpruner.model.identity import identify
from gradpruner.model.load import Loaded
from gradpruner.plan import Plan
from gradpruner.probe.igia import SCORES, Igia
from gradpruner.run.auto_ratio import AUTO, Choice, choose, hold_out
from gradpruner.run.folder import SETTINGS, SPEEDS, RunFolder, known_model, recorded
from gradpruner.run.four_bits import check_one_process
from gradpruner.run.job import Job
from gradpruner.run.models import RunModels
from gradpruner.run.only_worker import only_worker
from gradpruner.run.page import write_report
from gradpruner.run.plan_file import check_made_by_run, with_parameter_ratio
from gradpruner.run.probe_folder import IGIA, save_probe
from gradpruner.run.speeds import rows_with_speeds
from gradpruner.run.stages import watch
from gradpruner.run.summary import OF_THE_MACHINE, comparison
from gradpruner.run.task_scores import task_scores
from gradpruner.run.trainings import Trainings
from gradpruner.storage.files import read_json, write_json
from gradpruner.storage.provenance import MADE_FROM, RECORD, digest
from gradpruner.training.evaluate import Evaluation
from gradpruner.training.finetune import check_comparable, finish
from gradpruner.training.probe_length import check_probe_length
from gradpruner.training.shares import share_of
from gradpruner.training.trackers import figures_of

logger = logging.getLogger(__name__)


class Run:
    """A job, its data and the folder it works in.

    Processes that a launcher started work together: each makes the same calls.

    `everything` runs all stages. Each stage is a method of its own too: `run_probe`, `make_plan`, `train_dense`, `cut`,
    `train_pruned`.

    Args:
        job: the settings.
        train_examples: what the models are trained on.
        test_examples: what they are evaluated on at the end.
        folder: where everything is written. It is made if it does not exist.
        quiet: whether to show no progress bars.

    Raises:
        InvalidArgument: the folder holds another job, or there are no examples.
    """

    def __init__(
        self,
        job: Job,
        train_examples: Sequence[Example],
        test_examples: Sequence[Example],
        folder: str | os.PathLike[str],
        *,
        quiet: bool = False,
    ) -> None:
        if not train_examples or not test_examples:
            raise InvalidArgument("no training or no test examples; expected at least one of each")
        join()
        share_of(job.recipe, launched())
        check_probe_length(job.recipe, job.probing, job.steps)
        if job.load_in_4bit:
            check_one_process(launched())
        if job.harness is not None:
            job.harness.check()
        self.job, self.folder, self.quiet = job, Path(folder), quiet
        self.probe_folder = self.folder / "probe"
        self._plan_is_by_hand = False
        self._probe_digest: str | None = None
        # ratio = "auto" holds some training examples out, to try cuts on
        self._train, self._test = train_examples, test_examples
        self._held_out: Sequence[Example] = []
        if job.ratio == AUTO:
            self._train, self._held_out = hold_out(train_examples, job.check_rows, job.recipe.seed)
        known = first(lambda: known_model(recorded(self.folder, SETTINGS), job.source))
        identity = identify(job.source, trust_remote_code=job.trust_remote_code, known=known, say=logger.info)
        settings = {
            **job.to_dict(),
            "train_examples": len(train_examples),
            "test_examples": len(test_examples),
            "data": digest_of_examples(train_examples, test_examples)[:16],
            # how the test examples are divided; the names of the files are no part of the content
            "test_sets": [size for _, size in getattr(test_examples, "sets", ())],
        }
        self._stages = RunFolder(self.folder, settings, identity, job.save_steps)
        examples = {"training": self._train, "held-out": self._held_out, "test": self._test}
        examples = {purpose: some for purpose, some in examples.items() if len(some)}
        self.models = RunModels(job, self._train, self._stages, identity, examples)
        self._trainings = Trainings(job, self.models, self._stages, quiet=quiet)

    def everything(self, *, dense: bool = True) -> dict[str, Any]:
        """Run all stages.

        Args:
            dense: whether to train the uncut model too, to compare with.

        Returns:
            The results, as `results.json` holds them.
        """
        with only_worker(self.folder, self.folder / "run"):
            return self._everything(dense)

    def _everything(self, dense: bool) -> dict[str, Any]:
        # This comes before the dense run, which takes long. It fails if no cut is within the bound, or if the layers
        # are not comparable.
        plan = self._plan_of_checked_folder()
        igia = Igia.load(self.probe_folder / IGIA, lazy=True)
        kind = self._kind(plan)
        probe = {
            "steps": igia.steps,
            "skipped": igia.skipped,
            "margin": igia.margin(plan, kind),
            "stability": igia.stability(plan, kind),
            "layer_scores": igia.layer_scores(kind).tolist(),
            "watched": list(igia.watched),
        }
        rows = [self.train_dense()] if dense else []
        self.cut(plan)
        rows.append(self.train_pruned(plan))
        rows = self._with_speeds(rows)
        results = {"rows": rows, "plan": plan.to_dict(), "probe": probe}
        if self.job.harness is not None:
            results["harness"] = self._task_scores(rows)
        return first(lambda: self._write_results(results, igia, kind))

    def _write_results(self, results: dict[str, Any], igia: Igia, kind: str) -> dict[str, Any]:
        if self.job.ratio == AUTO and not self._plan_is_by_hand:
            results["auto"] = read_json(self.folder / "auto.json", "auto")
        write_json(self.folder / "results.json", results)
        write_report(self.folder)
        self._write_card(results["rows"], igia, kind)
        return results

    # stages

    def run_probe(self) -> Igia:
        """Train for the first steps. Write igia.safetensors and what was trained to `probe/`."""
        if not self._stages.is_made("probe", self._stages.settings):
            logger.info(f"probe: {self.job.probing} steps")
            model, tokenizer = self.models.load_dense()
            check_comparable(model, self.job.recipe)
            model, tokenizer = self.models.packed(Loaded(model, tokenizer), self.job.source)
            with self._trainings.tracked("probe") as tracker:
                watched, igia = watch(
                    model,
                    tokenizer,
                    self.models.rows_of_probe(tokenizer),
                    self.job.recipe,
                    of_steps=self.job.steps,
                    quiet=self.quiet,
                    callbacks=tracker.callbacks,
                )
            save_probe(self.probe_folder, igia, watched, made_from=self._stages.settings)
        return Igia.load(self.probe_folder / IGIA)

    def make_plan(self) -> Plan:
        """Score the layers and write plan.json.

        With ratio = "auto", cuts are tried first, and auto.json is written.

        plan.json may be edited, or put there by hand, until `cut` has used it.
        """
        path = self.folder / "plan.json"
        if not first(path.exists):
            content = self.plan_for(self._choose().count if self.job.ratio == AUTO else self.job.count).to_dict()
            made_from = {**self._made_from_probe(), "plan": digest(content)}
            first(lambda: write_json(path, {**content, MADE_FROM: made_from}))
        plan, record = first(lambda: (Plan.load(path), read_json(path, "plan").get(MADE_FROM)))
        if record is not None:
            stale = self._stages.after("plan.json")
            check_made_by_run(path, record, self._stages.settings, self._made_from_probe, stale)
        self._plan_is_by_hand = record is None or record.get("plan") != digest(plan.to_dict())
        chosen = self.job.ratio == AUTO and not self._plan_is_by_hand
        if chosen and not first((self.folder / "auto.json").exists):
            raise InvalidArgument(f"auto.json, by which {str(path)!r} was chosen, is gone; put it back, or delete both")
        if self._plan_is_by_hand:
            self.run_probe()
            plan = with_parameter_ratio(plan, Igia.load(self.probe_folder / IGIA, lazy=True))
            logger.info(
                "plan: plan.json was written or edited by hand; its layers are removed, not those of the scores"
            )
        logger.info(f"plan: {plan.summary()}")
        return plan

    def train_dense(self) -> dict[str, Any]:
        """Fine-tune the model as it is, with all the steps. Write `dense/` and return results."""
        return self._stages.result("dense", self._stages.settings, self._fine_tune_dense)

    def cut(self, plan: Plan) -> Path:
        """Merge and remove the layers. Write the smaller, not yet fine-tuned checkpoint to `cut/`."""
        made_from = self._made_from_plan(plan)
        if not self._stages.is_made("cut", made_from):
            first(lambda: self._cut(plan, made_from))
        return self.folder / "cut"

    def _cut(self, plan: Plan, made_from: Mapping[str, str]) -> None:
        self._stages.forget_results()
        smaller, tokenizer = self.models.cut(plan)
        igia = Igia.load(self.probe_folder / IGIA, lazy=True)
        with self._trainings.tracked("cut", self.job.probing) as tracker:
            tracker.log(figures_of(plan, igia, self.models.patches, kind=self._kind(plan)))

        def beside(inside: Path) -> None:
            self.models.carry_processor(smaller, inside)
            write_json(inside / RECORD, made_from)

        save(
            smaller,
            self.folder / "cut",
            tokenizer=tokenizer,
            plan=dataclasses.replace(plan, before=self.models.earlier_plan),
            beside=beside,
        )

    def train_pruned(self, plan: Plan) -> dict[str, Any]:
        """Fine-tune the smaller model with the remaining steps. Write `model/`, return results."""
        result = self._stages.result("pruned", self._made_from_plan(plan), lambda: self._fine_tune_pruned(plan))
        self._check_pruned_model(plan)
        return result

    def _with_speeds(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the results of the models, with how fast they generate."""
        return first(lambda: rows_with_speeds(rows, self._folders(rows), self.folder / SPEEDS, self.models.load))

    def _task_scores(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the scores of the models on the tasks of lm-evaluation-harness."""
        assert self.job.harness is not None
        made_from = {row["name"]: digest(row["training"]) for row in rows} | self._stages.settings
        size, folders = self.job.recipe.batch_size, self._folders(rows)
        return task_scores(
            self.job.harness, folders, self.folder, self.models.load, batch_size=size, made_from=made_from
        )

    def _folders(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Path]:
        """Return the checkpoint folders of the models that were trained."""
        folders = {"dense": self.folder / "dense", "pruned": self.folder / "model"}
        return {row["name"]: folders[row["name"]] for row in rows}

    def _write_card(self, rows: Sequence[Mapping[str, Any]], igia: Igia, kind: str) -> None:
        # a card is read on other machines, so it leaves out measurements of this one
        of_the_model = [line for line in comparison(rows) if line[""] not in OF_THE_MACHINE]
        scores = {} if self._plan_is_by_hand else {"scores": igia, "kind": kind}  # no score has chosen a plan by hand
        card = model_card(
            self.folder / "model",
            base_model=self.job.source,
            results=of_the_model,
            trust_remote_code=self.job.trust_remote_code,
            **scores,  # type: ignore[arg-type]
        )
        write_card(self.folder / "model", card)

    def _kind(self, plan: Plan) -> str:
        """Return the layer score that a plan is judged by. A plan by hand may name any other."""
        return plan.kind if plan.kind in SCORES else self.job.preset.kind

    # checks of what the folder holds already

    def _plan_of_checked_folder(self) -> Plan:
        """Return the plan, after refusing whatever the folder holds that is not of this run."""
        self._stages.is_made("dense.json", self._stages.settings)
        plan = self.make_plan()
        made_from = self._made_from_plan(plan)
        self._stages.is_made("cut", made_from)
        if self._stages.is_made("pruned.json", made_from):
            self._check_pruned_model(plan)
        return plan

    def _check_pruned_model(self, plan: Plan) -> None:
        """Raise InvalidArgument unless `model/` is there, with the layers of the plan."""
        first(lambda: self._check_model_folder(plan))

    def _check_model_folder(self, plan: Plan) -> None:
        model = self.folder / "model"
        if not (model / PLAN_FILE).is_file() or Plan.load(model / PLAN_FILE) != plan:
            raise InvalidArgument(
                f"{str(model)!r} is not the model that pruned.json belongs to; expected the folder that the run wrote. "
                f"To train it again, delete {str(self.folder / 'pruned.json')!r}"
            )

    def _made_from_probe(self) -> dict[str, str]:
        """Return the digests of what a plan is made from."""
        if self._probe_digest is None:
            if not self._stages.is_made("probe", self._stages.settings):
                self.run_probe()
            igia = Igia.load(self.probe_folder / IGIA, lazy=True)
            scores = (igia.layer_scores(kind).tolist() for kind in SCORES)
            self._probe_digest = digest([igia.model, igia.skipped, *scores])
        return {**self._stages.settings, "probe": self._probe_digest}

    def _made_from_plan(self, plan: Plan) -> dict[str, str]:
        """Return the digests of what the cut model is made from."""
        return {**self._made_from_probe(), "plan": digest(plan.to_dict())}

    # how many layers, and which

    def plan_for(self, count: int | None) -> Plan:
        """Return the plan by the probe's scores for `count` layers, or for the job's ratio."""
        ratio = self.job.ratio if count is None else None
        assert not isinstance(ratio, str)
        preset = self.job.preset
        return self.run_probe().plan(ratio, count=count, of=self.job.of, kind=preset.kind, merge=preset.merge)

    def _choose(self) -> Choice:
        """Return the count of ratio = "auto"."""
        preset, igia = self.job.preset, self.run_probe()
        igia.check_comparable()
        choice = choose(
            igia.layer_scores(preset.kind).tolist(),
            self.try_count,
            self.folder / "auto.json",
            bound=self.job.bound,
            steps=self.job.checking,
            made_from=self._made_from_probe(),
            least=preset.merge if isinstance(preset.merge, int) else 1,
        )
        logger.info(f"auto: {choice.reason}")
        return choice

    def try_count(self, count: int) -> Evaluation:
        """Score the cut of `count` layers after a short training. 0 is the dense model.

        The training uses the rows after those of the probe.
        """
        what = f"with {count} layers removed" if count else "of the dense model"
        logger.info(f"auto: {self.job.checking} steps {what}")
        plan = self.plan_for(count) if count else None
        with alone():  # every process makes the same model
            if plan is not None:
                model, tokenizer = self.models.cut(plan)
            else:
                model, tokenizer = self.models.load_probed()
                model = finish(model)  # as the cut does with what the probe trained
        take_weights_of_first(model)
        widening = self.job.preset.rank_factor if count else 1
        evaluation = self._trainings.trial(
            str(count), Loaded(model, tokenizer), widening, self._held_out, self._made_from_probe()
        )
        del model
        gc.collect()
        return evaluation

    # training and evaluation

    def _fine_tune_dense(self) -> dict[str, Any]:
        logger.info(f"dense: {self.job.steps} steps")
        loaded = self.models.load_dense()
        rows = self.models.rows(loaded.tokenizer)
        return self._trainings.fine_tune(
            "dense", loaded, rows, self._test, "dense", self._stages.settings, source=self.job.source
        )

    def _fine_tune_pruned(self, plan: Plan) -> dict[str, Any]:
        logger.info(f"pruned: {self.job.steps - self.job.probing} steps")
        loaded = self.models.load(str(self.folder / "cut"))
        plan = plan_of(str(self.folder / "cut"), loaded.model) or plan
        rows = self.models.rows(loaded.tokenizer)[self.job.probing * self.job.recipe.rows_per_step :]
        made_from = self._made_from_plan(plan)
        return self._trainings.fine_tune(
            "pruned", loaded, rows, self._test, "model", made_from, plan, source=str(self.folder / "cut")
        )
