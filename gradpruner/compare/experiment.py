"""Compare methods on one budget: the same rows, the same order, the same steps.

Everything is kept in one folder. Each probe, plan and trained model is named after what it was made from, so it is made
only once, even if several methods need it. A comparison that was stopped or extended continues from the files that are
there. The folder belongs to one content of the model and to one set of package versions. With others it is refused.

Several processes may work in the folder, each on models of its own, on one machine or on several. Processes that a
launcher started (torchrun) make each model together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from gradpruner.checkpoint.companions import refuse_masks
from gradpruner.checkpoint.masks import Masks
from gradpruner.compare.analysis import DENSE
from gradpruner.compare.cells import Cell, content_of, digest_of, finished
from gradpruner.compare.scoring import EVALUATED_AT_ONCE, tested
from gradpruner.compare.settings_file import COMPARISON_SETTINGS, HELD_OUT
from gradpruner.compare.terms import LAYERS, begin_or_continue, counts_of, held_out_of, method_names
from gradpruner.compare.together import claimed, together, write_below
from gradpruner.data.collator import Collator
from gradpruner.data.examples import Example, digest_of_examples
from gradpruner.distributed.agreement import agree, need_shared, take_weights_of_first
from gradpruner.distributed.launch import join, launched
from gradpruner.distributed.processes import alone, first
from gradpruner.errors import InvalidArgument
from gradpruner.methods import Clues, Method, parse_method
from gradpruner.model.accelerator import to_accelerator
from gradpruner.model.decoder import Decoder
from gradpruner.model.identity import identify
from gradpruner.model.load import Loaded, load_model
from gradpruner.plan import Plan
from gradpruner.probe.igia import Igia
from gradpruner.run.folder import MODEL, known_model, recorded
from gradpruner.run.job import Job, torch_dtype
from gradpruner.run.preflight import check_comparison
from gradpruner.run.probe_folder import IGIA, load_probed_model, save_probe
from gradpruner.run.stages import tune, watch
from gradpruner.storage.files import read_json, reading, write_json
from gradpruner.storage.locks import holder, lock
from gradpruner.storage.provenance import MADE_FROM, digest, is_made
from gradpruner.training.checkpoints import Checkpoints
from gradpruner.training.finetune import check_comparable
from gradpruner.training.recipe import Recipe
from gradpruner.training.schedule import Ordered, Row, schedule
from gradpruner.training.shares import share_of
from gradpruner.training.trackers import LOGS, Tracker, scores_of, tracked

logger = logging.getLogger(__name__)

SETTINGS = COMPARISON_SETTINGS
POLL = 2.0  # seconds between two looks whether the models of other processes are finished
# of a job
TERMS = (
    *("source", "steps", "recipe", "probe_steps", "max_length", "train_on", "too_long", "chat_template", "dtype"),
    "attention",
)


class _Untrained(NamedTuple):
    """A model that is cut and not yet trained, with the rest of its budget."""

    model: Any
    tokenizer: Any
    rows: Ordered
    recipe: Recipe
    masks: Masks | None
    about: dict[str, Any]  # entries of the cell's file


class Compare:
    """A comparison and its folder.

    Args:
        job: model, steps and recipe. Its seed is replaced by each of `seeds`, its ratio and merging by those of the
            methods.
        train_examples: what is trained on, and held out.
        test_examples: what the trained models are scored on.
        folder: where everything is kept. A folder with a comparison on the same terms is continued.
        methods: what removes the layers; see `parse_method`.
        ratios: shares of the layers to remove. Default: 0.4 alone.
        seeds: training seeds, one run of every model for each. Default: 0 alone.
        held_out: training examples that nothing is trained on, for methods that try cuts. Default 48.
        dense: train the dense model too. Default True.

    Raises:
        InvalidArgument: an argument is empty or wrong, or the folder holds a comparison on other terms.
    """

    def __init__(
        self,
        job: Job,
        train_examples: Sequence[Example],
        test_examples: Sequence[Example],
        folder: str | os.PathLike[str],
        *,
        methods: Sequence[str],
        ratios: Sequence[float] = (0.4,),
        seeds: Sequence[int] = (0,),
        held_out: int = HELD_OUT,
        dense: bool = True,
    ) -> None:
        join()
        share_of(job.recipe, launched())
        if not test_examples or not 0 < held_out < len(train_examples):
            raise InvalidArgument(
                f"{len(train_examples)} training and {len(test_examples)} test examples, {held_out} held out; expected "
                "at least one of each"
            )
        if not methods or not ratios or not seeds:
            raise InvalidArgument("methods, ratios or seeds is empty; expected at least one of each")
        if job.harness is not None:
            job.harness.check()
        self.job, self.folder = job, Path(folder)
        self.methods, self.seeds = method_names(methods, job), list(dict.fromkeys(seeds))
        self.ratios, self.with_dense = ratios, dense
        self._held_out, self._train = held_out_of(train_examples, held_out)
        self._test = test_examples
        before = first(lambda: recorded(self.folder, SETTINGS))
        self._identity = identify(
            job.source,
            trust_remote_code=job.trust_remote_code,
            say=logger.info,
            known=known_model(before, job.source),
        )
        self.terms = self._own_terms()
        agree("the comparison", self.terms)
        with together(self.folder / "locks" / "terms"):
            first(lambda: begin_or_continue(self.folder, self.terms))
        need_shared(self.folder)
        self._made_from = {"terms": digest(self.terms)}

    def _own_terms(self) -> dict[str, Any]:
        """Return what every model of the folder must have been made on."""
        terms = {name: self.job.to_dict()[name] for name in TERMS}
        return {
            **terms,
            "recipe": {**terms["recipe"], "seed": None},
            "train_examples": len(self._train),
            "test_examples": len(self._test),
            "data": digest_of_examples(self._held_out, self._train, self._test),
            "held_out": len(self._held_out),
            "harness": None if self.job.harness is None else self.job.harness.identity(),
            MODEL: self._identity.to_dict(),
        }

    def cells(self, layers: int) -> list[Cell]:
        """Return all models of the comparison, dense ones first.

        Args:
            layers: decoder layers of the dense model.

        Raises:
            InvalidArgument: a ratio, or an option of a method, does not fit the model.
        """
        counts = counts_of(layers, self.ratios, self.methods)
        dense = [Cell(DENSE, 0, seed) for seed in self.seeds] if self.with_dense else []
        return dense + [Cell(m, count, seed) for seed in self.seeds for count in counts for m in self.methods]

    def work(self, *, wait: bool = True) -> None:
        """Make every model that is not there yet and that no other process is making.

        Args:
            wait: whether to wait for the models that others are making. If another process dies, its model is made
                here. Default True.
        """
        others = self._make_free(self.cells(self.layers()))
        told: set[str] = set()
        while wait and others:
            for cell in others:
                if cell.name not in told:
                    told.add(cell.name)
                    who = first(lambda cell=cell: holder(self._lock(cell)))  # type: ignore[misc]
                    logger.info(f"{cell.title}: {who or 'another process'} is making it; waiting")
            time.sleep(POLL)
            others = self._make_free(others)

    def _make_free(self, cells: Sequence[Cell]) -> list[Cell]:
        """Make the models that nobody else is making. Return the others that are not finished."""
        others = []
        for cell in cells:
            if first(lambda cell=cell: is_made(self._cell(cell), self._made_from)):  # type: ignore[misc]
                continue
            with claimed(self._lock(cell)) as mine:
                if not mine:
                    others.append(cell)
                elif not first(self._cell(cell).exists):
                    self._make(cell)
                    gc.collect()
        return others

    def _lock(self, cell: Cell) -> Path:
        return self.folder / "locks" / cell.name

    def layers(self) -> int:
        """Return the number of decoder layers of the dense model.

        The first call checks everything that can be checked beforehand.

        Raises:
            InvalidArgument: see `check_comparison`.
            ProbeError: a method could not score the layers.
        """
        return first(self._checked_layers)

    def _checked_layers(self) -> int:
        path = self.folder / LAYERS
        with lock(self.folder / "locks" / "model"):
            if not path.exists():
                model, tokenizer = self._load()
                examples = {"held-out": self._held_out, "training": self._train, "test": self._test}
                check_comparison(self.job, model, tokenizer, examples)
                decoder = Decoder(model)
                for method in map(parse_method, self.methods):
                    if method.scored:
                        check_comparable(decoder.base, self._probe_recipe(method, self.seeds[0]))
                write_json(path, {"layers": len(decoder.layers), "parameters": decoder.total_parameters()})
        with reading(str(path)):
            return int(read_json(path, "model")["layers"])

    @property
    def revision(self) -> str | None:
        """The commit of a hub id that every model is made from; None for files on this machine."""
        return self._identity.revision

    def finished(self) -> list[dict[str, Any]]:
        """Return every model in the folder that is done."""
        return finished(self.folder)

    def rows_of_dense(self) -> Ordered:
        """Return the rows of the dense run with the first seed, in order."""
        recipe = dataclasses.replace(self.job.recipe, seed=self.seeds[0])
        return self._rows(self._train, self._load()[1], recipe)

    def _cell(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell.name}.json"

    def _make(self, cell: Cell) -> None:
        """Cut, train and score one model, and write its cell.

        A model that was trained for another cell is not trained again.
        """
        untrained = self._untrained(cell)
        content = [content_of(untrained.model), untrained.rows.digest(), untrained.recipe.to_dict(), self.terms["data"]]
        key = digest_of(content if untrained.masks is None else [*content, "masked"])
        with together(self.folder / "locks" / key):
            path = self.folder / "trained" / f"{key}.json"
            checkpoints = Checkpoints(self.folder / "checkpoints" / key, self.job.save_steps, {"trained": key})
            if not first(lambda: is_made(path, self._made_from)):
                logger.info(f"{cell.title}: {len(untrained.rows) // untrained.recipe.rows_per_step} steps")
                figures = {**self._train_and_test(untrained, checkpoints, cell), MADE_FROM: self._made_from}
                first(lambda: write_below(path, figures))
            checkpoints.discard()
        about = {**untrained.about, "trained": key, MADE_FROM: self._made_from}
        first(lambda: write_below(self._cell(cell), about))
        logger.info(f"{cell.title}: exact match {first(lambda: read_json(path, 'training')['exact_match'])}")

    def _untrained(self, cell: Cell) -> _Untrained:
        """Return the model of a cell before its training, the layers of its plan removed."""
        began = time.perf_counter()
        model, tokenizer = self._load()
        layers = len(Decoder(model).layers)
        recipe = dataclasses.replace(self.job.recipe, seed=cell.seed)
        rows = self._rows(self._train, tokenizer, recipe)
        about: dict[str, Any] = {**vars(cell), "options": cell.options, "ratio": cell.count / layers}
        masks: Masks | None = None
        if cell.method == DENSE:
            about |= {"removed": [], "merged": {}}
        else:
            method = parse_method(cell.method)
            probed_rows = (method.probe_steps or self.job.probing) * recipe.rows_per_step
            keeps_adapters = method.settled("adapters") == "keep"
            if method.probed or keeps_adapters:
                about["probe"] = self._probe(method, tokenizer, cell.seed).name
            logger.info(f"{cell.title}: choosing")
            to_accelerator(model, trains=True)
            with alone():  # every process makes the same model
                if keeps_adapters:
                    model = load_probed_model(model, self.folder / "probes" / about["probe"])
                clues = self._clues(method, model, tokenizer, rows[:probed_rows], cell.seed)
            plan = first(lambda: self._plan(method, clues, cell))
            with alone():
                model = method.cut(clues, plan)
            take_weights_of_first(model)
            masks = method.masks(model)
            rows, recipe = rows[probed_rows:], recipe.widened(method.settled("rank_factor"))
            about |= {"removed": list(plan.removed), "merged": plan.to_dict()["merge"]}
        about["seconds_to_cut"] = time.perf_counter() - began
        return _Untrained(model, tokenizer, rows, recipe, masks, about)

    def _train_and_test(self, untrained: _Untrained, checkpoints: Checkpoints, cell: Cell) -> dict[str, Any]:
        first_step = self.job.steps - len(untrained.rows) // untrained.recipe.rows_per_step
        with self._tracked(untrained.recipe, cell.name, first_step) as tracker:
            model, training = tune(
                untrained.model,
                untrained.tokenizer,
                untrained.rows,
                untrained.recipe,
                quiet=True,
                masks=untrained.masks,
                checkpoints=checkpoints,
                callbacks=tracker.callbacks,
            )
            scores = tested(model, untrained.tokenizer, self._test, self.job)
            fates = {f"gradpruner/fate/{layer:02d}": 1.0 for layer in untrained.about["removed"]}
            tracker.log({**fates, **{f"test_{measure}": value for measure, value in scores.items()}})
        if self.job.harness is not None:
            scores["harness"] = self.job.harness.evaluate(model, untrained.tokenizer, batch_size=EVALUATED_AT_ONCE)
        decoder = Decoder(model)
        return {
            **scores,
            "layers": len(decoder.layers),
            "parameters": decoder.total_parameters(),
            "training_seconds": training.seconds,
            "training": training.to_dict(),
        }

    def _tracked(self, recipe: Recipe, stage: str, step: int = 0) -> contextlib.AbstractContextManager[Tracker]:
        return tracked(recipe, self.folder / LOGS, stage, name=self.folder.resolve().name, first_step=step)

    def _clues(self, method: Method, model: nn.Module, tokenizer: Any, rows: Sequence[Row], seed: int) -> Clues:
        collate = Collator(tokenizer)
        size = self.job.recipe.batch_size

        def batches(rows: Sequence[Row]) -> list[Any]:
            return [collate(rows[i : i + size]) for i in range(0, len(rows), size)]

        held_out = self.job.tokenize(self._held_out, tokenizer)

        def igia() -> Igia:
            return Igia.load(self._probe(method, tokenizer, seed) / IGIA, lazy=True)

        return Clues(model, batches(rows), batches(held_out), seed, igia)

    def _probe(self, method: Method, tokenizer: Any, seed: int) -> Path:
        """Return the folder of the probe that a method needs, making it if it is not there."""
        steps = method.probe_steps or self.job.probing
        recipe = self._probe_recipe(method, seed)
        examples = self._train[: max(1, round(method.share * len(self._train)))] if method.share else self._train
        rows = self._rows(examples, tokenizer, recipe)[: steps * recipe.rows_per_step]
        path = self.folder / "probes" / digest_of([rows.digest(), recipe.to_dict(), self._identity.to_dict()])
        with together(self.folder / "locks" / path.name):
            if not first(lambda: is_made(path, self._made_from)):
                first(lambda: path.parent.mkdir(exist_ok=True))
                logger.info(f"seed {seed}: probing {steps} steps")
                model = self._load()[0]
                if method.scored:
                    check_comparable(model, recipe)
                with self._tracked(recipe, f"probe-{path.name[:8]}-{seed}") as tracker:
                    watched, igia = watch(
                        model, tokenizer, rows, recipe, of_steps=self.job.steps, quiet=True, callbacks=tracker.callbacks
                    )
                    tracker.log(scores_of(igia))
                save_probe(path, igia, watched, made_from=self._made_from)
        return path

    def _probe_recipe(self, method: Method, seed: int) -> Recipe:
        rank = self.job.recipe.rank if method.rank is None else method.rank
        return dataclasses.replace(self.job.recipe, seed=seed, rank=rank)

    def _plan(self, method: Method, clues: Clues, cell: Cell) -> Plan:
        path = self.folder / "plans" / f"{cell.name}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            made = method.plan(clues, cell.count).to_dict()
            write_json(path, {**made, MADE_FROM: {**self._made_from, "plan": digest(made)}})
        plan = Plan.load(path)
        # a plan that somebody edited is not what the method chose
        is_made(path, {**self._made_from, "plan": digest(plan.to_dict())})
        return plan

    def _load(self) -> Loaded:
        self._identity.check_unchanged()
        loaded = load_model(
            self.job.source,
            dtype=torch_dtype(self.job.dtype),
            attention=self.job.attention,
            chat_template=self.job.chat_template,
            trust_remote_code=self.job.trust_remote_code,
            revision=self._identity.revision,
        )
        refuse_masks(self.job.source, "compare", self._identity.revision)
        return loaded

    def _rows(self, examples: Sequence[Example], tokenizer: Any, recipe: Recipe) -> Ordered:
        return schedule(self.job.tokenize(examples, tokenizer), self.job.steps, recipe)
