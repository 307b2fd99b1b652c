"""Compare methods on one budget: the same rows, the same order, the same steps.

Everything is kept in one folder. Each probe, plan and trained model is named after what it was made from, so it is made
only once, even if several methods need it. A comparison that was stopped or extended continues from the files that are
there. The folder belongs to one content of the model and to one set of package versions. With others it is refused.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import logging
import os
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from gradpruner.checkpoint.companions import refuse_masks
from gradpruner.checkpoint.masks import Masks
from gradpruner.compare.analysis import DENSE
from gradpruner.compare.cells import Cell, digest_of, finished
from gradpruner.compare.scoring import EVALUATED_AT_ONCE, tested
from gradpruner.compare.settings_file import COMPARISON_SETTINGS
from gradpruner.data.collator import Collator
from gradpruner.data.examples import Example
from gradpruner.data.tokens import tokenize
from gradpruner.errors import InvalidArgument
from gradpruner.methods import Clues, Method, format_method, parse_method
from gradpruner.model.decoder import Decoder
from gradpruner.model.identity import identify
from gradpruner.model.load import Loaded, load_model
from gradpruner.plan import Plan
from gradpruner.probe.igia import Igia
from gradpruner.probe.selection import how_many
from gradpruner.run.folder import MODEL, known_model, named, recorded
from gradpruner.run.job import Job, torch_dtype
from gradpruner.run.preflight import check_comparison
from gradpruner.run.probe_folder import IGIA, load_probed_model, save_probe
from gradpruner.run.stages import tune, watch
from gradpruner.storage.files import read_json, reading, write_json
from gradpruner.storage.locks import claim, lock
from gradpruner.storage.provenance import MADE_FROM, digest, is_made
from gradpruner.training.checkpoints import Checkpoints
from gradpruner.training.finetune import check_comparable
from gradpruner.training.recipe import Recipe
from gradpruner.training.schedule import Row, schedule

logger = logging.getLogger(__name__)

SETTINGS = COMPARISON_SETTINGS
LAYERS = "model.json"  # of the dense model; written once everything that can be checked beforehand was checked
KEPT = (LAYERS, "cells", "trained", "probes", "plans")
TERMS = ("source", "steps", "recipe", "probe_steps", "max_length", "train_on", "dtype", "attention")  # of a job


class _Untrained(NamedTuple):
    """A model that is cut and not yet trained, with the rest of its budget."""

    model: Any
    tokenizer: Any
    rows: list[Row]
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
        held_out: int = 48,
        dense: bool = True,
    ) -> None:
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
        self.methods, self.seeds = _method_names(methods, job), list(dict.fromkeys(seeds))
        self.ratios, self.with_dense = ratios, dense
        shuffled = list(train_examples)
        random.Random(0).shuffle(shuffled)
        self._held_out, self._train, self._test = shuffled[:held_out], shuffled[held_out:], list(test_examples)
        before = recorded(self.folder, SETTINGS)
        self._identity = identify(
            job.source,
            trust_remote_code=job.trust_remote_code,
            say=logger.info,
            known=known_model(before, job.source),
        )
        self.terms = self._own_terms()
        if before is None:
            self._begin()
        else:
            self._continue(before)
        self._made_from = {"terms": digest(self.terms)}

    def _own_terms(self) -> dict[str, Any]:
        """Return what every model of the folder must have been made on."""
        terms = {name: self.job.to_dict()[name] for name in TERMS}
        return {
            **terms,
            "recipe": {**terms["recipe"], "seed": None},
            "train_examples": len(self._train),
            "test_examples": len(self._test),
            "data": digest_of([*self._held_out, *self._train, *self._test]),
            "held_out": len(self._held_out),
            "harness": None if self.job.harness is None else self.job.harness.to_dict(),
            MODEL: self._identity.to_dict(),
        }

    def _begin(self) -> None:
        """Write the terms into a folder that holds no comparison.

        Raises InvalidArgument if it holds parts of one.
        """
        parts = [name for name in KEPT if (self.folder / name).exists()]
        if parts:
            raise InvalidArgument(
                f"folder {str(self.folder)!r} holds {', '.join(parts)} of a comparison, but not its {SETTINGS}; "
                f"expected a new folder, or the {SETTINGS} that belongs to them"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / SETTINGS, self.terms)

    def _continue(self, before: Mapping[str, Any]) -> None:
        """Go on with a folder's comparison. Raises InvalidArgument if it is on other terms."""
        changed = sorted(name for name in self.terms if before.get(name) != self.terms[name])
        if changed and not (self.folder / LAYERS).exists():
            write_json(self.folder / SETTINGS, self.terms)  # nothing is there that was made on the old terms
        elif changed:
            raise InvalidArgument(
                f"folder {str(self.folder)!r} holds a comparison with another "
                f"{', '.join(named(changed, before, self.terms))}; expected a new folder, or the same terms, model "
                "and package versions to go on or to add methods, ratios and seeds"
            )

    def cells(self, layers: int) -> list[Cell]:
        """Return all models of the comparison, dense ones first.

        Args:
            layers: decoder layers of the dense model.
        """
        counts = list(dict.fromkeys(how_many(layers, ratio) for ratio in self.ratios))
        dense = [Cell(DENSE, 0, seed) for seed in self.seeds] if self.with_dense else []
        return dense + [Cell(m, count, seed) for seed in self.seeds for count in counts for m in self.methods]

    def work(self) -> None:
        """Make every model that is not there yet and that no other process is making."""
        for cell in self.cells(self.layers()):
            if is_made(self._cell(cell), self._made_from):
                continue
            with claim(self.folder / "locks" / cell.name) as mine:
                if mine and not self._cell(cell).exists():
                    self._make(cell)
                    gc.collect()

    def layers(self) -> int:
        """Return the number of decoder layers of the dense model.

        The first call checks everything that can be checked beforehand.

        Raises:
            InvalidArgument: see `check_comparison`.
            ProbeError: a method could not score the layers.
        """
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

    def rows_of_dense(self) -> list[Row]:
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
        content = [_content(untrained.model), untrained.rows, untrained.recipe.to_dict(), self.terms["data"]]
        key = digest_of(content if untrained.masks is None else [*content, "masked"])
        with lock(self.folder / "locks" / key):
            path = self.folder / "trained" / f"{key}.json"
            checkpoints = Checkpoints(self.folder / "checkpoints" / key, self.job.save_steps, {"trained": key})
            if not is_made(path, self._made_from):
                logger.info(f"{cell.title}: {len(untrained.rows) // untrained.recipe.rows_per_step} steps")
                path.parent.mkdir(exist_ok=True)
                figures = self._train_and_test(untrained, checkpoints)
                write_json(path, {**figures, MADE_FROM: self._made_from})
            checkpoints.discard()
        self._cell(cell).parent.mkdir(exist_ok=True)
        write_json(self._cell(cell), {**untrained.about, "trained": key, MADE_FROM: self._made_from})
        logger.info(f"{cell.title}: exact match {read_json(path, 'training')['exact_match']}")

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
            if keeps_adapters:
                model = load_probed_model(model, self.folder / "probes" / about["probe"])
            clues = self._clues(method, model, tokenizer, rows[:probed_rows], cell.seed)
            logger.info(f"{cell.title}: choosing")
            plan = self._plan(method, clues, cell)
            model = method.cut(clues, plan)
            masks = method.masks(model)
            rows, recipe = rows[probed_rows:], recipe.widened(method.settled("rank_factor"))
            about |= {"removed": list(plan.removed), "merged": plan.to_dict()["merge"]}
        about["seconds_to_cut"] = time.perf_counter() - began
        return _Untrained(model, tokenizer, rows, recipe, masks, about)

    def _train_and_test(self, untrained: _Untrained, checkpoints: Checkpoints) -> dict[str, Any]:
        model, training = tune(
            untrained.model,
            untrained.tokenizer,
            untrained.rows,
            untrained.recipe,
            quiet=True,
            masks=untrained.masks,
            checkpoints=checkpoints,
        )
        scores = tested(model, untrained.tokenizer, self._test, self.job)
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

    def _clues(self, method: Method, model: nn.Module, tokenizer: Any, rows: list[Row], seed: int) -> Clues:
        collate = Collator(tokenizer)
        size = self.job.recipe.batch_size

        def batches(rows: Sequence[Row]) -> list[Any]:
            return [collate(rows[i : i + size]) for i in range(0, len(rows), size)]

        held_out = self._tokens(self._held_out, tokenizer)

        def igia() -> Igia:
            return Igia.load(self._probe(method, tokenizer, seed) / IGIA, lazy=True)

        return Clues(model, batches(rows), batches(held_out), seed, igia)

    def _probe(self, method: Method, tokenizer: Any, seed: int) -> Path:
        """Return the folder of the probe that a method needs, making it if it is not there."""
        steps = method.probe_steps or self.job.probing
        recipe = self._probe_recipe(method, seed)
        examples = self._train[: max(1, round(method.share * len(self._train)))] if method.share else self._train
        rows = self._rows(examples, tokenizer, recipe)[: steps * recipe.rows_per_step]
        path = self.folder / "probes" / digest_of([rows, recipe.to_dict(), self._identity.to_dict()])
        with lock(self.folder / "locks" / path.name):
            if not is_made(path, self._made_from):
                path.parent.mkdir(exist_ok=True)
                logger.info(f"seed {seed}: probing {steps} steps")
                model = self._load()[0]
                if method.scored:
                    check_comparable(model, recipe)
                watched, igia = watch(model, tokenizer, rows, recipe, of_steps=self.job.steps, quiet=True)
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
            trust_remote_code=self.job.trust_remote_code,
            revision=self._identity.revision,
        )
        refuse_masks(self.job.source, "compare", self._identity.revision)
        return loaded

    def _tokens(self, examples: Sequence[Example], tokenizer: Any) -> list[dict[str, list[int]]]:
        return tokenize(examples, tokenizer, max_length=self.job.max_length, train_on=self.job.train_on)  # type: ignore[arg-type]

    def _rows(self, examples: Sequence[Example], tokenizer: Any, recipe: Recipe) -> list[Row]:
        return schedule(self._tokens(examples, tokenizer), self.job.steps, recipe)


def _method_names(methods: Sequence[str], job: Job) -> list[str]:
    """Return every method once, by its full name.

    Raises InvalidArgument if a probe takes all the steps.
    """
    parsed = {format_method(method): method for method in map(parse_method, methods)}
    for name, method in parsed.items():
        probing = method.probe_steps or job.probing
        if probing >= job.steps:
            raise InvalidArgument(f"{name}: {probing} steps to probe of {job.steps}; expected fewer")
    return list(parsed)


def _content(model: nn.Module) -> str:
    """Return a digest of every parameter. Two plans that make the same model are trained once."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
