"""Methods against each other on one budget: the same rows in the same order, the same number of optimizer steps.

Everything is kept in one folder under what it was made from: a probe, a plan, a trained model's figures are computed
once, whoever asks for them, and a comparison that was stopped, or is asked for more, goes on from what is there. The
folder belongs to one content of the model and to one set of package versions: with others it is not continued.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradpruner.checkpoint.companions import refuse_masks
from gradpruner.checkpoint.masks import Masks
from gradpruner.errors import GradPrunerError, InvalidArgument
from gradpruner.methods import METHODS, Clues, GradPruner, Method, parse_method, spelled
from gradpruner.model.decoder import Decoder
from gradpruner.model.identity import identify
from gradpruner.model.load import load_model
from gradpruner.model.loss import IGNORED
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
from gradpruner.training.data import Collator, Example, tokenize
from gradpruner.training.evaluate import answers, macro_f1, perplexity, perplexity_of
from gradpruner.training.finetune import check_comparable
from gradpruner.training.recipe import Recipe, Row, schedule

DENSE, OURS = "dense", spelled(GradPruner())
FEW = 10  # classes: with more of them, macro-F1 is not what people look at
EVALUATED_AT_ONCE = 32
SETTINGS = "comparison.json"
KEPT = ("model.json", "cells", "trained", "probes", "plans")
LAYERS = "model.json"  # of the dense model; written once all that can be told beforehand was checked
TERMS = ("source", "steps", "recipe", "probe_steps", "max_length", "train_on", "dtype", "attention")  # of a job


def _nothing(line: str) -> None:
    """Say nothing; unlike a lambda it goes with a comparison into another process."""


@dataclass(frozen=True)
class Cell:
    """One model of the comparison: what a method (or nothing, "dense") makes with `count` layers less."""

    method: str
    count: int
    seed: int

    @property
    def name(self) -> str:
        """As a file is called: by what its method does, whatever the defaults are when that is asked for."""
        return f"{self.method.partition(':')[0]}-{_digest(self.options)[:8]}-{self.count}-{self.seed}"

    @property
    def title(self) -> str:
        """As a person reads it."""
        return f"{self.method}{f', {self.count} layers less' if self.count else ''}, seed {self.seed}"

    @property
    def options(self) -> dict[str, Any]:
        """Of the method, spelled out."""
        return {} if self.method == DENSE else parse_method(self.method).options


class Compare:
    """A comparison and its folder.

    job: model, steps, recipe; its seed is replaced by each of `seeds`, its ratio and merging by those of the methods.
    methods: see `parse_method`. ratios: shares of the layers. held_out: training examples that nothing is trained on,
    for methods that want to try. Raises InvalidArgument; also if the folder holds a comparison on other terms.
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
        say: Callable[[str], None] = _nothing,
    ) -> None:
        if not test_examples or not 0 < held_out < len(train_examples):
            raise InvalidArgument(
                f"{len(train_examples)} training and {len(test_examples)} test examples, {held_out} held out; expected "
                "at least one of each"
            )
        if not methods or not ratios or not seeds:
            raise InvalidArgument("methods, ratios or seeds is empty; expected at least one of each")
        self.job, self.folder, self.say = job, Path(folder), say
        parsed = {spelled(method): method for method in map(parse_method, methods)}
        for name, method in parsed.items():
            probing = method.probe_steps or job.probing
            if probing >= job.steps:
                raise InvalidArgument(f"{name}: {probing} steps to probe of {job.steps}; expected fewer")
        self.methods, self.seeds = list(parsed), list(dict.fromkeys(seeds))
        self.ratios, self.with_dense = ratios, dense
        shuffled = list(train_examples)
        random.Random(0).shuffle(shuffled)
        self._held_out, self._train, self._test = shuffled[:held_out], shuffled[held_out:], list(test_examples)
        self.terms = {
            **{name: job.to_dict()[name] for name in TERMS},
            "train_examples": len(self._train),
            "test_examples": len(self._test),
            "data": _digest([*self._held_out, *self._train, *self._test]),
            "held_out": held_out,
        }
        self.terms["recipe"] = {**self.terms["recipe"], "seed": None}
        before = recorded(self.folder, SETTINGS)
        self._identity = identify(
            job.source, trust_remote_code=job.trust_remote_code, say=say, known=known_model(before, job.source)
        )
        self.terms[MODEL] = self._identity.to_dict()
        if before is not None:
            changed = sorted(name for name in self.terms if before.get(name) != self.terms[name])
            if changed and not (self.folder / LAYERS).exists():
                write_json(self.folder / SETTINGS, self.terms)  # nothing is there that was made on the old terms
            elif changed:
                raise InvalidArgument(
                    f"folder {str(self.folder)!r} holds a comparison with another "
                    f"{', '.join(named(changed, before, self.terms))}; expected a new folder, or the same terms, model "
                    "and package versions to go on or to add methods, ratios and seeds"
                )
        else:
            there = [name for name in KEPT if (self.folder / name).exists()]
            if there:
                raise InvalidArgument(
                    f"folder {str(self.folder)!r} holds {', '.join(there)} of a comparison, but not its {SETTINGS}; "
                    f"expected a new folder, or the {SETTINGS} that belongs to them"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / SETTINGS, self.terms)
        self._made_from = {"terms": digest(self.terms)}

    def cells(self, layers: int) -> list[Cell]:
        """All models, dense ones first."""
        counts = list(dict.fromkeys(how_many(layers, ratio) for ratio in self.ratios))
        found = [Cell(DENSE, 0, seed) for seed in self.seeds] if self.with_dense else []
        return found + [Cell(m, count, seed) for seed in self.seeds for count in counts for m in self.methods]

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
        """Decoder layers of the dense model. The first time, raises what `check_comparison` does, and ProbeError where
        a method could not score them."""
        path = self.folder / LAYERS
        with lock(self.folder / "locks" / "model"):
            if not path.exists():
                model, tokenizer = self._load()
                of_it = {"held-out": self._held_out, "training": self._train, "test": self._test}
                check_comparison(self.job, model, tokenizer, of_it)
                decoder = Decoder(model)
                for method in map(parse_method, self.methods):
                    if method.scored:
                        check_comparable(decoder.base, self._probe_recipe(method, self.seeds[0]))
                write_json(path, {"layers": len(decoder.layers), "parameters": decoder.total_parameters()})
        with reading(str(path)):
            return int(read_json(path, "model")["layers"])

    @property
    def revision(self) -> str | None:
        """The commit of a hub id that every model of the comparison is made from; None for files on this machine."""
        return self._identity.revision

    def finished(self) -> list[dict[str, Any]]:
        """Every model in the folder that is done."""
        return finished(self.folder)

    def rows_of_dense(self) -> list[Row]:
        """The rows of the dense run with the first seed, in order."""
        recipe = dataclasses.replace(self.job.recipe, seed=self.seeds[0])
        return self._rows(self._train, self._load()[1], recipe)

    def _cell(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell.name}.json"

    def _make(self, cell: Cell) -> None:
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
            probing = method.probe_steps or self.job.probing
            if method.probed or method.settled("adapters") == "keep":
                about["probe"] = self._probe(method, tokenizer, cell.seed).name
            if method.settled("adapters") == "keep":
                model = load_probed_model(model, self.folder / "probes" / about["probe"])
            clues = self._clues(method, model, tokenizer, rows[: probing * recipe.rows_a_step], cell.seed)
            self.say(f"{cell.title}: choosing")
            plan = self._plan(method, clues, cell)
            model = method.cut(clues, plan)
            masks = method.masks(model)
            rows, recipe = rows[probing * recipe.rows_a_step :], recipe.widened(method.settled("rank_factor"))
            about |= {"removed": list(plan.removed), "merged": plan.to_dict()["merge"]}
        about["seconds_to_cut"] = time.perf_counter() - began
        content = [_content(model), rows, recipe.to_dict(), self.terms["data"]]
        key = _digest(content if masks is None else [*content, "masked"])
        with lock(self.folder / "locks" / key):
            path = self.folder / "trained" / f"{key}.json"
            checkpoints = Checkpoints(self.folder / "checkpoints" / key, self.job.save_steps, {"trained": key})
            if not is_made(path, self._made_from):
                self.say(f"{cell.title}: {len(rows) // recipe.rows_a_step} steps")
                path.parent.mkdir(exist_ok=True)
                done = self._train_and_test(model, tokenizer, rows, recipe, masks, checkpoints)
                write_json(path, {**done, MADE_FROM: self._made_from})
            checkpoints.discard()
        self._cell(cell).parent.mkdir(exist_ok=True)
        write_json(self._cell(cell), {**about, "trained": key, MADE_FROM: self._made_from})
        self.say(f"{cell.title}: exact match {read_json(path, 'training')['exact_match']}")

    def _train_and_test(
        self, model: Any, tokenizer: Any, rows: list[Row], recipe: Recipe, masks: Masks | None, checkpoints: Checkpoints
    ) -> dict[str, Any]:
        model, training = tune(model, tokenizer, rows, recipe, quiet=True, masks=masks, checkpoints=checkpoints)
        found = tested(model, tokenizer, self._test, self.job)
        decoder = Decoder(model)
        return {
            **found,
            "layers": len(decoder.layers),
            "parameters": decoder.total_parameters(),
            "training_seconds": training.seconds,
            "training": training.to_dict(),
        }

    def _clues(self, method: Method, model: nn.Module, tokenizer: Any, rows: list[Row], seed: int) -> Clues:
        collate = Collator(tokenizer)
        size = self.job.recipe.batch_size

        def batches(of: Sequence[Row]) -> list[Any]:
            return [collate(of[i : i + size]) for i in range(0, len(of), size)]

        held_out = self._tokens(self._held_out, tokenizer)

        def igia() -> Igia:
            return Igia.load(self._probe(method, tokenizer, seed) / IGIA, lazy=True)

        return Clues(model, batches(rows), batches(held_out), seed, igia)

    def _probe(self, method: Method, tokenizer: Any, seed: int) -> Path:
        """The folder of the probe that a method needs, made now if it is not there."""
        steps = method.probe_steps or self.job.probing
        recipe = self._probe_recipe(method, seed)
        examples = self._train[: max(1, round(method.share * len(self._train)))] if method.share else self._train
        rows = self._rows(examples, tokenizer, recipe)[: steps * recipe.rows_a_step]
        path = self.folder / "probes" / _digest([rows, recipe.to_dict(), self._identity.to_dict()])
        with lock(self.folder / "locks" / path.name):
            if not is_made(path, self._made_from):
                path.parent.mkdir(exist_ok=True)
                self.say(f"seed {seed}: probing {steps} steps")
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

    def _load(self) -> tuple[Any, Any]:
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


def finished(folder: Path) -> list[dict[str, Any]]:
    """Every model of a comparison that is done: dense first, then by count, method and seed."""
    order = [DENSE, OURS]
    with reading(str(folder)):
        cells = [read_json(path, "cell") for path in sorted((folder / "cells").glob("*.json"))]
        for cell in cells:  # what "gradpruner" meant then may have another name now
            if cell["method"] != DENSE:
                cell["method"] = spelled(METHODS[cell["method"].partition(":")[0]](**cell["options"]))
        cells.sort(key=lambda c: (c["count"], c["method"] not in order, c["method"], c["seed"]))
        return [{**read_json(folder / "trained" / f"{c['trained']}.json", "training"), **c} for c in cells]


def work_in_processes(comparison: Compare, processes: int) -> None:
    """`comparison.work()` in so many processes, each with its share of the cores and, where there are, a GPU.

    Raises InvalidArgument if a ratio is wrong, GradPrunerError if a process failed; the others finish what they can.
    """
    comparison.cells(comparison.layers())  # what is wrong with a ratio is told here, not by every process
    if processes == 1:
        comparison.work()
        return
    spawn = multiprocessing.get_context("spawn")
    children = [spawn.Process(target=_child, args=(comparison, i, processes)) for i in range(processes)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    failed = sum(child.exitcode != 0 for child in children)
    if failed:
        raise GradPrunerError(f"{failed} of {processes} processes failed; what the others finished is kept")


def _child(comparison: Compare, index: int, processes: int) -> None:
    if torch.cuda.device_count():
        os.environ["CUDA_VISIBLE_DEVICES"] = str(index % torch.cuda.device_count())
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    comparison.work()


def tested(model: Any, tokenizer: Any, examples: Sequence[Example], job: Job) -> dict[str, Any]:
    """Exact match, macro-F1 where there are few different answers, perplexity; `right`: 1 or 0 for every example."""
    collate, found = Collator(tokenizer), dict[str, Any](exact_match=None, macro_f1=None, right="")
    answered = [e for e in examples if e.answer]
    rows = tokenize(answered, tokenizer, max_length=job.max_length)
    judged = answers(model, rows, collate=collate, batch_size=EVALUATED_AT_ONCE) if rows else []
    if judged:
        found["exact_match"] = sum(answer.right for answer in judged) / len(judged)
        found["right"] = "".join(str(int(answer.right)) for answer in judged)
        truth = [tuple(t for t in row["labels"][1:] if t != IGNORED) for row in rows]  # nothing says the first token
        if len(set(truth)) <= FEW:
            found["macro_f1"] = macro_f1([answer.said for answer in judged], truth)
    if job.train_on == "answer" and len(answered) == len(examples):
        found["perplexity"] = perplexity_of(sum(a.loss for a in judged) / sum(a.tokens for a in judged))
    else:
        every = tokenize(examples, tokenizer, max_length=job.max_length, train_on=job.train_on)  # type: ignore[arg-type]
        found["perplexity"] = perplexity(model, every, collate=collate, batch_size=EVALUATED_AT_ONCE)
    return {**found, "examples": len(examples)}


def _digest(of: Any) -> str:
    return hashlib.sha256(repr(of).encode()).hexdigest()[:16]


def _content(model: nn.Module) -> str:
    """A digest of every parameter: two plans that make the same model are trained once."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
