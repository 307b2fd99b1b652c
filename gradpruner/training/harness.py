"""Score a model on tasks of lm-evaluation-harness.

Most published scores come from this package, `lm-eval`. It is an optional extra. Everything that can be refused without
a model is refused by `Harness.check`: a missing package, an unknown task, a data set that cannot be loaded.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import importlib.metadata
import logging
import os
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from gradpruner.checks import check_int, is_number
from gradpruner.errors import InvalidArgument
from gradpruner.model.accelerator import to_accelerator
from gradpruner.model.identity import sha256_of
from gradpruner.model.modes import evaluating
from gradpruner.storage.provenance import digest

logger = logging.getLogger(__name__)

PACKAGE = "lm-eval"
STDERR = "_stderr"
# Warnings of lm-eval on how it is called here. They are right, and nobody can do anything about them.
EXPECTED = re.compile(
    r"`pretrained` model kwarg is not of type `str`|^Passed an already-initialized|^Overwriting default num_fewshot"
)
CUT = re.compile(r"truncat", re.IGNORECASE)


@dataclass(frozen=True)
class Harness:
    """Which tasks of lm-evaluation-harness a model is scored on, and how.

    Args:
        tasks: names of tasks, groups or tags, as lm-eval lists them.
        folder: a folder with task files (YAML) of your own. Default: lm-eval's own tasks alone.
        num_fewshot: solved examples before each question. Default: as each task says, 0 where it does not.
        limit: a number of examples per task, or below 1 their share. Default: all.
        apply_chat_template: whether each request becomes a chat message of the tokenizer's template.

    Raises:
        InvalidArgument: a setting is not accepted.
    """

    tasks: tuple[str, ...]
    folder: str | None = None
    num_fewshot: int | None = None
    limit: float | None = None
    apply_chat_template: bool = False

    def __post_init__(self) -> None:
        """Check what needs no package."""
        if isinstance(self.tasks, str) or not self.tasks or not all(isinstance(t, str) and t for t in self.tasks):
            raise InvalidArgument(f"tasks = {self.tasks!r}; expected names of tasks, for example ('arc_easy',)")
        object.__setattr__(self, "tasks", tuple(dict.fromkeys(self.tasks)))
        if self.num_fewshot is not None:
            check_int("num_fewshot", self.num_fewshot, 0, "a number of solved examples before each question")
        if self.limit is not None and not _is_limit(self.limit):
            raise InvalidArgument(f"limit = {self.limit!r} of a task; accepted: a whole number, or a share below 1")
        if self.folder is not None and not any(Path(self.folder).rglob("*.yaml")):
            raise InvalidArgument(
                f"folder {self.folder!r} of tasks holds no .yaml file; expected task files of lm-eval"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {**asdict(self), "tasks": list(self.tasks)}

    def identity(self) -> dict[str, Any]:
        """Return what decides the scores of a model, ready for JSON.

        That is the settings, the content of the folder, and the version of lm-eval. Every file of the folder counts,
        because task files name data and code beside them.
        """
        folder = None if self.folder is None else Path(self.folder)
        files = [] if folder is None else sorted(path for path in folder.rglob("*") if path.is_file())
        seen = [
            [str(path.relative_to(folder)), sha256_of(path)]
            for path in files
            if folder is not None and "__pycache__" not in path.parts
        ]
        return {**self.to_dict(), "files": digest(seen), "lm_eval": importlib.metadata.version(PACKAGE)}

    def check(self) -> None:
        """Refuse what cannot be run, before a model is loaded.

        Data sets of the tasks are downloaded here.

        Raises:
            InvalidArgument: the package is missing, a task is unknown, its data cannot be loaded, it needs pictures or
                sound, or it runs code that the model writes; or several processes were started.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InvalidArgument("tasks of lm-eval run in one process; accepted: the same command without a launcher")
        with _keeping_random_states():
            tasks = self._load()["tasks"]
        for name, task in tasks.items():
            if getattr(task, "MULTIMODAL", False):
                raise InvalidArgument(f"task {name!r} needs pictures or sound; accepted are tasks of text alone")
            if getattr(task, "UNSAFE_CODE", False):
                raise InvalidArgument(
                    f"task {name!r} runs code that the model writes, which gradpruner does not do; run it by lm-eval "
                    "itself, on the written checkpoint: lm_eval run --model hf --confirm_run_unsafe_code"
                )

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a chat template that is asked for and missing.

        Raises:
            InvalidArgument: the tokenizer has none.
        """
        if self.apply_chat_template and not getattr(tokenizer, "chat_template", None):
            raise InvalidArgument(
                "apply_chat_template is set, but the tokenizer has no chat template; expected a chat model, or leave "
                "it out"
            )

    def evaluate(self, model: Any, tokenizer: Any, *, batch_size: int) -> dict[str, Any]:
        """Score a model on the tasks. Model, tokenizer and random states are as before afterwards.

        Args:
            model: a transformers model for causal language modelling. It is moved to the accelerator, if there is one.
            tokenizer: its tokenizer.
            batch_size: requests of one forward pass. It changes only speed and memory.

        Returns:
            Plain values, ready for JSON. "tasks": for each task and each group its `version`, the `num_fewshot` that
            was really used, how many `samples` of how many (`of`) were scored, and `metrics` with value and standard
            error.
            "settings": those of `to_dict`. "lm_eval": the version of the package. "truncated": how often lm-eval said
            that it cut an input which is longer than the model can read.

        Raises:
            InvalidArgument: see `check` and `check_tokenizer`, or lm-eval refuses the model.
        """
        self.check()
        self.check_tokenizer(tokenizer)
        to_accelerator(model)
        with _keeping_random_states(), evaluating(model), _heard_warnings() as heard:
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM

            try:
                found = simple_evaluate(
                    HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size),
                    tasks=list(self.tasks),
                    num_fewshot=self.num_fewshot,
                    limit=int(self.limit) if self.limit is not None and self.limit >= 1 else self.limit,
                    apply_chat_template=self.apply_chat_template,
                    log_samples=False,
                    task_manager=_manager(self.tasks, self.folder),
                )
            except (AssertionError, KeyError, NotImplementedError, ValueError) as error:
                raise InvalidArgument(f"tasks {', '.join(self.tasks)}: lm-eval says: {_one_line(error)}") from error
        assert found is not None  # None is what lm-eval returns in processes beside the first
        return {
            "tasks": _by_task(found),
            "settings": self.to_dict(),
            "lm_eval": importlib.metadata.version(PACKAGE),
            "truncated": sum(bool(CUT.search(warning)) for warning in heard),
        }

    def _load(self) -> Any:
        """Return the tasks as lm-eval loads them."""
        manager = _manager(self.tasks, self.folder)
        known = manager.all_tasks
        for name in self.tasks:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=5)
                hint = f"; similar: {', '.join(near)}" if near else ""
                raise InvalidArgument(
                    f"task {name!r} is unknown to lm-eval {importlib.metadata.version(PACKAGE)}{hint}; "
                    "`lm_eval ls tasks` lists all"
                )
        try:
            return manager.load(list(self.tasks))
        except Exception as error:  # a task may run code of its own, and data sets fail in many ways
            raise InvalidArgument(
                f"tasks {', '.join(self.tasks)}: lm-eval cannot load them or their data: {_one_line(error)}"
            ) from error


@functools.cache
def _manager(tasks: tuple[str, ...], folder: str | None) -> Any:
    """Return lm-eval's index of tasks.

    Reading the index of its own tasks takes seconds, so it is left out where the folder holds all that are asked for.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InvalidArgument(f"tasks need the package {PACKAGE} ({error}): pip install gradpruner[harness]") from error
    if folder is not None:
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(tasks) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=folder)


def harness_rows(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a table with a line per task and metric, and a column per model.

    Args:
        found: what `Harness.evaluate` returned, by the name of the model. The settings are the same for all.

    Returns:
        Rows for `gradpruner.report.tables`. A value stands before its standard error: "0.412 ± 0.018".
    """
    rows = []
    first = next(iter(found.values()))
    for name, task in first["tasks"].items():
        for index, metric in enumerate(task["metrics"]):
            row: dict[str, Any] = {
                "task": name,
                "metric": metric["name"] if metric["filter"] == "none" else f"{metric['name']}, {metric['filter']}",
                "better": {True: "higher", False: "lower"}.get(metric["higher_is_better"], ""),
                "shots": task["num_fewshot"],
                "examples": task["samples"],
            }
            for model, result in found.items():
                row[model] = with_error(result["tasks"][name]["metrics"][index])
            rows.append(row)
    return rows


def harness_note(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what must be known to read the table of `harness_rows` right.

    Args:
        found: see `harness_rows`.
    """
    first = next(iter(found.values()))
    parts = [f"lm-evaluation-harness {first['lm_eval']}; ± is its standard error over the examples."]
    if first["settings"]["limit"] is not None:
        parts.append("Only a part of each task's examples was used, so these are no scores to publish.")
    for model, result in found.items():
        if result["truncated"]:
            parts.append(f"{model}: inputs longer than the model can read were cut ({result['truncated']} warnings).")
    return " ".join(parts)


def with_error(metric: Mapping[str, Any]) -> str:
    """Return a value with its standard error, where there is one: "0.412 ± 0.018"."""
    if not is_number(metric["value"]):
        return str(metric["value"])
    return f"{metric['value']:.3f}" + ("" if metric["stderr"] is None else f" ± {metric['stderr']:.3f}")


def _by_task(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return lm-eval's results as plain values. Groups come with the tasks they consist of."""
    tasks = {}
    for name, entries in {**found["results"], **found.get("groups", {})}.items():
        samples = found.get("n-samples", {}).get(name, {})
        better = found.get("higher_is_better", {}).get(name, {})
        metrics = []
        for key, value in entries.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith(STDERR):
                continue
            error = entries.get(f"{metric}{STDERR},{kind}")
            metrics.append(
                {
                    "name": metric,
                    "filter": kind,
                    "value": float(value) if is_number(value) else value,
                    "stderr": float(error) if is_number(error) else None,  # "N/A" where lm-eval computes none
                    "higher_is_better": better.get(metric),
                }
            )
        tasks[name] = {
            "version": found.get("versions", {}).get(name),
            "num_fewshot": found.get("n-shot", {}).get(name),
            "samples": samples.get("effective", entries.get("sample_len")),
            "of": samples.get("original"),
            "metrics": metrics,
        }
    return tasks


@contextlib.contextmanager
def _keeping_random_states() -> Iterator[None]:
    """Restore the random states afterwards: lm-eval seeds everything for itself."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if devices:
            torch.cuda.set_rng_state_all(devices)


class _Warnings(logging.Handler):
    """Logs each kind of warning once, as this package's own, and keeps the texts of all."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []
        self._kinds: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        self.heard.append(text)
        kind = re.sub(r"\d+", "N", text)
        if kind not in self._kinds and not EXPECTED.search(text):
            self._kinds.add(kind)
            logger.warning(f"lm-eval: {text}")


@contextlib.contextmanager
def _heard_warnings() -> Iterator[list[str]]:
    """Collect the warnings that lm-eval logs."""
    theirs, handler = logging.getLogger("lm_eval"), _Warnings()
    before = theirs.propagate
    theirs.addHandler(handler)
    theirs.propagate = False
    try:
        yield handler.heard
    finally:
        theirs.removeHandler(handler)
        theirs.propagate = before


def _is_limit(value: Any) -> bool:
    return is_number(value) and (0 < value < 1 or (value >= 1 and value == int(value)))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
