"""The main job, stage by stage: probe, plan, dense run, cut, fine-tune, evaluate, report.

Every stage reads the files of those before it and writes its own last, so a run that was stopped goes on
from the first stage whose file is missing. Every stage's file records what it was made from, and a file that was made
from something else is refused. A stage that trains goes on from its newest checkpoint.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradpruner.checkpoint.card import model_card, write_card
from gradpruner.checkpoint.companions import plan_of, refuse_masks
from gradpruner.checkpoint.save import PLAN_FILE, save
from gradpruner.errors import InvalidArgument, ModelMismatch
from gradpruner.model.decoder import Decoder
from gradpruner.model.identity import identify
from gradpruner.model.load import load_model
from gradpruner.plan import Plan
from gradpruner.probe.coverage import share_range
from gradpruner.probe.igia import SCORES, Igia
from gradpruner.pruning.apply import apply
from gradpruner.pruning.patch import Patch, fit_patches
from gradpruner.report.pages import html_report
from gradpruner.report.plots import plot_layer_scores
from gradpruner.run.auto_ratio import AUTO, Choice, choose, hold_out, trial_rows
from gradpruner.run.folder import SETTINGS, SPEEDS, RunFolder, known_model, recorded
from gradpruner.run.job import Job, torch_dtype
from gradpruner.run.preflight import check_run
from gradpruner.run.probe_folder import IGIA, load_probed_model, save_probe
from gradpruner.run.speeds import speeds_in_turns
from gradpruner.run.stages import measure, tune, watch
from gradpruner.run.summary import OF_THE_MACHINE, TURNS, comparison, notes
from gradpruner.storage.files import read_json, reading, write_json
from gradpruner.storage.provenance import MADE_FROM, RECORD, digest, need_same
from gradpruner.training.data import Collator, Example, tokenize
from gradpruner.training.divergence import why_failed
from gradpruner.training.evaluate import Evaluation
from gradpruner.training.finetune import check_comparable, finish
from gradpruner.training.recipe import Row, schedule


class Run:
    """A job, its data and the folder it works in. Raises InvalidArgument if the folder holds another job."""

    def __init__(
        self,
        job: Job,
        train_examples: Sequence[Example],
        test_examples: Sequence[Example],
        folder: str | os.PathLike[str],
        *,
        say: Callable[[str], None] = lambda line: None,
        quiet: bool = False,
    ) -> None:
        if not train_examples or not test_examples:
            raise InvalidArgument("no training or no test examples; expected at least one of each")
        self.job, self.folder, self.say, self.quiet = job, Path(folder), say, quiet
        self._earlier: Plan | None = None  # that the source had been pruned by, known when it is loaded
        self._by_hand = False  # the plan
        self._scores: str | None = None  # a digest of the probe's scores
        kept, self._held_out = train_examples, list[Example]()
        if job.ratio == AUTO:
            kept, self._held_out = hold_out(train_examples, job.check_rows, job.recipe.seed)
        self._examples = kept, test_examples
        known = known_model(recorded(self.folder, SETTINGS), job.source)
        self._identity = identify(job.source, trust_remote_code=job.trust_remote_code, known=known, say=say)
        settings = {
            **job.to_dict(),
            "train_examples": len(train_examples),
            "test_examples": len(test_examples),
            "data": hashlib.sha256(repr([*train_examples, *test_examples]).encode()).hexdigest()[:16],
        }
        self._kept = RunFolder(self.folder, settings, self._identity, job.save_steps)

    def everything(self, *, dense: bool = True) -> dict[str, Any]:
        """All stages; the results as `results.json` holds them. dense: train the uncut model too, to compare."""
        # before the dense run is paid for: no cut may be within the bound, or the layers may not be comparable
        plan = self._checked()
        igia = Igia.load(self._probed / IGIA, lazy=True)
        kind = plan.kind if plan.kind in SCORES else self.job.settings.kind  # a plan by hand may name any other
        probe = {
            "steps": igia.steps,
            "skipped": igia.skipped,
            "margin": igia.margin(plan, kind),
            "stability": igia.stability(plan, kind),
            "layer_scores": igia.layer_scores(kind).tolist(),
            "watched": list(igia.watched),
        }
        rows = [self.dense()] if dense else []
        self.cut(plan)
        rows.append(self.pruned(plan))
        rows = self.with_speeds(rows)
        results = {"rows": rows, "plan": plan.to_dict(), "probe": probe}
        if self.job.ratio == AUTO and not self._by_hand:
            results["auto"] = read_json(self.folder / "auto.json", "auto")
        write_json(self.folder / "results.json", results)
        write_report(self.folder)
        # a card travels without the machine that it was made on
        of_the_model = [line for line in comparison(rows) if line[""] not in OF_THE_MACHINE]
        scored = {} if self._by_hand else {"scores": igia, "kind": kind}  # no score has chosen a plan by hand
        card = model_card(
            self.folder / "model",
            base_model=self.job.source,
            results=of_the_model,
            trust_remote_code=self.job.trust_remote_code,
            **scored,  # type: ignore[arg-type]
        )
        write_card(self.folder / "model", card)
        return results

    def dense(self) -> dict[str, Any]:
        """Fine-tune and evaluate the model as it is, with all the steps."""
        return self._kept.result("dense", self._kept.settings, self._dense)

    def probe(self) -> Igia:
        """Train for the first steps and write `probe/`: igia.safetensors, and the adapters that were trained."""
        if not self._kept.is_made("probe", self._kept.settings):
            self.say(f"probe: {self.job.probing} steps")
            model, tokenizer = self._load_dense()
            check_comparable(model, self.job.recipe)
            watched, igia = watch(
                model,
                tokenizer,
                self._probe_rows(tokenizer),
                self.job.recipe,
                of_steps=self.job.steps,
                quiet=self.quiet,
            )
            save_probe(self._probed, igia, watched, made_from=self._kept.settings)
        return Igia.load(self._probed / IGIA)

    def plan(self) -> Plan:
        """Score the layers and write plan.json; with ratio = "auto", try cuts before and write auto.json.

        plan.json may be edited, or put there by hand, until `cut` has used it.
        """
        path = self.folder / "plan.json"
        if not path.exists():
            planned = self._planned(self._choose().count if self.job.ratio == AUTO else self.job.count).to_dict()
            write_json(path, {**planned, MADE_FROM: {**self._from_probe(), "plan": digest(planned)}})
        plan, record = Plan.load(path), read_json(path, "plan").get(MADE_FROM)
        if record is not None:
            self._check_ours(path, record)
        self._by_hand = record is None or record.get("plan") != digest(plan.to_dict())
        if self.job.ratio == AUTO and not self._by_hand and not (self.folder / "auto.json").exists():
            raise InvalidArgument(f"auto.json, by which {str(path)!r} was chosen, is gone; put it back, or delete both")
        if self._by_hand:
            plan = self._completed(plan)
            self.say("plan: plan.json was written or edited by hand; its layers are removed, not those of the scores")
        self.say(f"plan: {plan.summary()}")
        return plan

    def _check_ours(self, path: Path, record: Any) -> None:
        """Raise InvalidArgument unless plan.json was made from this run's settings and probe."""
        if not isinstance(record, Mapping) or record.get("settings") != self._kept.settings["settings"]:
            raise InvalidArgument(
                f"{str(path)!r} was made by another run, or with other settings; expected a plan of this run. Delete "
                f"it, or remove its {MADE_FROM!r} to use it as a plan by hand"
            )
        need_same(
            path,
            {**record, "plan": ""},
            {**self._from_probe(), "plan": ""},
            delete=[path, *self._kept.after("plan.json")],
        )

    def cut(self, plan: Plan) -> Path:
        """Fold and remove the layers; the smaller, not yet fine-tuned checkpoint is `cut/`."""
        path, made_from = self.folder / "cut", self._from_plan(plan)
        if not self._kept.is_made("cut", made_from):
            self._kept.forget_results()
            smaller, tokenizer = self._smaller(plan)
            save(
                smaller,
                path,
                tokenizer=tokenizer,
                plan=dataclasses.replace(plan, before=self._earlier),
                beside=lambda inside: write_json(inside / RECORD, made_from),
            )
        return path

    def pruned(self, plan: Plan) -> dict[str, Any]:
        """Fine-tune the smaller model with the steps that the probe left, evaluate it, write `model/`."""
        found = self._kept.result("pruned", self._from_plan(plan), lambda: self._pruned(plan))
        self._check_model(plan)
        return found

    def _check_model(self, plan: Plan) -> None:
        """Raise InvalidArgument unless `model/` is there, with the layers of the plan."""
        model = self.folder / "model"
        if not (model / PLAN_FILE).is_file() or Plan.load(model / PLAN_FILE) != plan:
            raise InvalidArgument(
                f"{str(model)!r} is not the model that pruned.json belongs to; expected the folder that the run wrote. "
                f"To train it again, delete {str(self.folder / 'pruned.json')!r}"
            )

    def _checked(self) -> Plan:
        """Return the plan, after what is there already and is not of this run was refused."""
        self._kept.is_made("dense.json", self._kept.settings)
        plan = self.plan()
        made_from = self._from_plan(plan)
        self._kept.is_made("cut", made_from)
        if self._kept.is_made("pruned.json", made_from):
            self._check_model(plan)
        return plan

    def _completed(self, plan: Plan) -> Plan:
        """Return a plan that was edited by hand, with the share of parameters that its layers really have."""
        self.probe()
        igia = Igia.load(self._probed / IGIA, lazy=True)
        if plan.layers != igia.layers:
            raise ModelMismatch(f"plan.json is for {plan.layers} decoder layers; the model has {igia.layers}")
        if plan.model not in (None, igia.model):
            raise ModelMismatch(
                "plan.json was made for another model than the run's; expected a plan for this one, or none of its "
                "fingerprint: set its 'model' to null if it is meant for this one all the same"
            )
        return dataclasses.replace(plan, parameter_ratio=igia.parameter_ratio(plan.removed))

    def _from_probe(self) -> dict[str, str]:
        """Return the digests of what a plan is made from."""
        if self._scores is None:
            if not self._kept.is_made("probe", self._kept.settings):
                self.probe()
            igia = Igia.load(self._probed / IGIA, lazy=True)
            self._scores = digest([igia.model, igia.skipped, *(igia.layer_scores(kind).tolist() for kind in SCORES)])
        return {**self._kept.settings, "probe": self._scores}

    def _from_plan(self, plan: Plan) -> dict[str, str]:
        """Return the digests of what the cut model is made from."""
        return {**self._from_probe(), "plan": digest(plan.to_dict())}

    def with_speeds(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The rows of dense and pruned, with how fast their models generate; measured in turns, and kept.

        Where the folder of a model is gone, what was not measured before is None.
        """
        folders = {"dense": self.folder / "dense", "pruned": self.folder / "model"}
        folders = {row["name"]: folders[row["name"]] for row in rows}
        path = self.folder / SPEEDS
        if not path.exists() or read_json(path, "speeds").keys() != folders.keys():
            if not all(folder.is_dir() for folder in folders.values()):
                return [{"tokens_per_second": None, **row} for row in rows]
            self.say(f"generation: {' and '.join(folders)} in turns")
            write_json(path, speeds_in_turns(folders, self._load))
        found = read_json(path, "speeds")
        return [
            {**row, "tokens_per_second": statistics.median(found[row["name"]]), TURNS: found[row["name"]]}
            for row in rows
        ]

    def _planned(self, count: int | None) -> Plan:
        ratio = self.job.ratio if count is None else None
        assert not isinstance(ratio, str)
        chosen = self.job.settings
        return self.probe().plan(ratio, count=count, of=self.job.of, kind=chosen.kind, merge=chosen.merge)

    def _before_the_cut(self) -> tuple[Any, Any]:
        """The dense model, inside the adapters that the probe trained where these are kept."""
        model, tokenizer = self._load_dense()
        self._earlier = plan_of(self.job.source, model, self._identity.revision)
        return load_probed_model(model, self._probed) if self.job.settings.adapters == "keep" else model, tokenizer

    def _smaller(self, plan: Plan) -> tuple[Any, Any]:
        chosen = self.job.settings
        model, tokenizer = self._before_the_cut()
        patches: list[Patch] = []
        if chosen.patch:
            collate, rows, size = Collator(tokenizer), self._probe_rows(tokenizer), self.job.recipe.batch_size
            patches = fit_patches(model, plan, (collate(rows[i : i + size]) for i in range(0, len(rows), size)))
            self.say(
                f"patches: {', '.join(f'{p.weight.layer}: {p.unexplained:.2f} unexplained' for p in patches) or 'none'}"
            )
        igia = Igia.load(self._probed / IGIA) if plan.merge else None
        smaller = apply(
            model, plan, igia, top=chosen.top, weight=chosen.weight, patches=patches, adapters=chosen.adapters
        )
        return smaller, tokenizer

    def _choose(self) -> Choice:
        chosen, igia = self.job.settings, self.probe()
        igia.check_comparable()
        choice = choose(
            igia.layer_scores(chosen.kind).tolist(),
            self._check,
            self.folder / "auto.json",
            bound=self.job.bound,
            steps=self.job.checking,
            made_from=self._from_probe(),
            least=chosen.merge if isinstance(chosen.merge, int) else 1,
        )
        self.say(f"auto: {choice.reason}")
        return choice

    def _check(self, count: int) -> Evaluation:
        """The cut of `count` layers (0: the dense model) after a short run of its own on the rows after the probe's."""
        self.say(f"auto: {self.job.checking} steps {f'with {count} layers removed' if count else 'of the dense model'}")
        if count:
            model, tokenizer = self._smaller(self._planned(count))
        else:
            model, tokenizer = self._before_the_cut()
            model = finish(model)  # as the cut does with what the probe trained
        size = self.job.recipe.rows_a_step
        rows = self._rows(tokenizer)[self.job.probing * size : (self.job.probing + self.job.checking) * size]
        recipe = self.job.recipe.widened(self.job.settings.rank_factor if count else 1)
        checkpoints = self._kept.checkpoints(f"check-{count}", self._from_probe())
        model, _ = tune(model, tokenizer, rows, recipe, quiet=self.quiet, checkpoints=checkpoints)
        evaluation = self._measured(model, tokenizer, self._held_out)
        checkpoints.discard()
        del model
        gc.collect()
        return evaluation

    def _measured(self, model: Any, tokenizer: Any, examples: Sequence[Example]) -> Evaluation:
        return measure(
            model,
            tokenizer,
            examples,
            max_length=self.job.max_length,
            train_on=self.job.train_on,
            batch_size=self.job.recipe.batch_size,
        )

    def _dense(self) -> dict[str, Any]:
        self.say(f"dense: {self.job.steps} steps")
        model, tokenizer = self._load_dense()
        return self._train_and_measure("dense", model, tokenizer, self._rows(tokenizer), "dense", self._kept.settings)

    def _pruned(self, plan: Plan) -> dict[str, Any]:
        self.say(f"pruned: {self.job.steps - self.job.probing} steps")
        model, tokenizer = self._load(str(self.folder / "cut"))
        plan = plan_of(str(self.folder / "cut"), model) or plan
        rows = self._rows(tokenizer)[self.job.probing * self.job.recipe.rows_a_step :]
        return self._train_and_measure("pruned", model, tokenizer, rows, "model", self._from_plan(plan), plan)

    def _train_and_measure(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        rows: list[Row],
        folder: str,
        made_from: Mapping[str, str],
        plan: Plan | None = None,
    ) -> dict[str, Any]:
        recipe = self.job.recipe.widened(1 if plan is None else self.job.settings.rank_factor)
        model, training = tune(
            model, tokenizer, rows, recipe, quiet=self.quiet, checkpoints=self._kept.checkpoints(name, made_from)
        )
        self.say(f"{name}: evaluating {len(self._examples[1])} examples")
        saved = save(model, self.folder / folder, tokenizer=tokenizer, plan=plan, overwrite=True)
        evaluation = self._measured(model, tokenizer, self._examples[1])
        decoder = Decoder(model)
        return {
            "name": name,
            "layers": len(decoder.layers),
            "parameters": decoder.total_parameters(),
            **evaluation.to_dict(),
            "step_seconds": training.step_seconds,
            "peak_bytes": training.peak_bytes,
            "checkpoint_bytes": sum(f.stat().st_size for f in saved.glob("*.safetensors")),
            "failed": why_failed(f"the {name} run", training.losses, evaluation.perplexity),
            "training": training.to_dict(),
        }

    @property
    def _probed(self) -> Path:
        return self.folder / "probe"

    def _probe_rows(self, tokenizer: Any) -> list[Row]:
        return self._rows(tokenizer)[: self.job.probing * self.job.recipe.rows_a_step]

    def _load_dense(self) -> tuple[Any, Any]:
        self._identity.check_unchanged()
        model, tokenizer = self._load(self.job.source, self._identity.revision)
        refuse_masks(self.job.source, "run", self._identity.revision)
        if not self._kept.is_made("probe", self._kept.settings):  # nothing has been paid for yet
            of_run = {"training": [*self._examples[0], *self._held_out], "test": self._examples[1]}
            check_run(self.job, model, tokenizer, self.folder, of_run)
        return model, tokenizer

    def _load(self, source: str, revision: str | None = None) -> tuple[Any, Any]:
        return load_model(
            source,
            dtype=torch_dtype(self.job.dtype),
            attention=self.job.attention,
            trust_remote_code=self.job.trust_remote_code,
            revision=revision,
        )

    def _rows(self, tokenizer: Any) -> list[Row]:
        tokens = tokenize(self._examples[0], tokenizer, max_length=self.job.max_length, train_on=self.job.train_on)  # type: ignore[arg-type]
        return schedule(tokens, self.job.steps, self.job.recipe)


def write_report(folder: Path) -> Path:
    """Draw layer_scores.png and write report.html from results.json.

    Raises InvalidArgument if there is none, CheckpointError if it or run.json is damaged.
    """
    with reading(str(folder / "results.json")):
        return _report_of(folder)


def _report_of(folder: Path) -> Path:
    results, settings = read_json(folder / "results.json", "results"), read_json(folder / "run.json", "run")
    plan, probe, picture = Plan.from_dict(results["plan"]), results["probe"], folder / "layer_scores.png"
    plot_layer_scores(probe["layer_scores"], plan, picture)
    stability = probe["stability"]
    summary = {
        "model": settings["source"],
        "plan": plan.summary(),
        "steps": f"{settings['steps']}, {settings['probe_steps']} of them to probe",
        "margin at the cut": f"{probe['margin']:.3f}",
        **({"watched of each layer's parameters": share_range(probe["watched"])} if "watched" in probe else {}),
        "removed layers settled after half of the probe": f"{stability[(len(stability) - 1) // 2]:.0%}",
    }
    auto, rows = results.get("auto"), results["rows"]
    beside = {text: list[dict[str, Any]]() for text in (notes(rows), *(row.get("failed") for row in rows)) if text}
    if auto:
        beside[auto["reason"]] = trial_rows(auto)
    html_report(
        folder / "report.html",
        title="gradpruner",
        summary=summary,
        rows=comparison(rows),
        plots=[picture],
        explained=beside,
    )
    return folder / "report.html"
