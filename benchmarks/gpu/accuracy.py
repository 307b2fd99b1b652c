"""A real model on a real task, dense and with 40 % of its layers removed, on the full budget of three epochs."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.session import Session
from gradpruner.compare.analysis import DENSE
from gradpruner.compare.cells import OURS
from gradpruner.compare.experiment import Compare
from gradpruner.compare.processes import work_in_processes
from gradpruner.data.examples import Example
from gradpruner.data.load import load_examples
from gradpruner.run.job import Job
from gradpruner.training.recipe import Recipe

PROMPT, ANSWER = "Question: {text}\nIntent:", "{category}"  # banking77
EPOCHS, RATIO, HELD_OUT = 3, 0.4, 16
POLL = 2.0  # seconds


def banking77(session: Session) -> None:
    """Both models for every seed at once, each in a process of its own: the score counts here, not the time."""
    if session.model is None or not session.data:
        raise ValueError("the part 'accuracy' needs --model FILE_OR_FOLDER_OF_PIECES and --data CSV [CSV]")
    with tempfile.TemporaryDirectory() as scratch:
        source = joined(session.model, Path(scratch))
        train, test = _examples(session)
        recipe = Recipe(batch_size=2 if session.tiny else 16, learning_rate=2e-3, group_by_length=True)
        held_out = 4 if session.tiny else HELD_OUT
        steps = 4 if session.tiny else EPOCHS * (len(train) - held_out) // recipe.batch_size
        job = Job(str(source), steps, recipe, dtype="bfloat16", max_length=128, probe_steps=2 if session.tiny else None)
        comparison = Compare(
            job,
            train,
            test,
            Path(scratch) / "models",
            methods=["gradpruner"],
            ratios=[RATIO],
            seeds=session.seeds,
            held_out=held_out,
        )
        session.put(
            what="task",
            train_rows=len(train) - held_out,
            test_rows=len(test),
            steps=steps,
            batch_size=recipe.batch_size,
        )
        _work(session, comparison)


def _work(session: Session, comparison: Compare) -> None:
    """Make all models; a row for each as soon as it is there, and the table so far."""
    processes = 1 if session.tiny else 2 * len(session.seeds)
    began = time.monotonic()
    failure: list[BaseException] = []

    def work() -> None:
        try:
            work_in_processes(comparison, processes)
        except BaseException as error:
            failure.append(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    shown = set[tuple[str, int]]()
    while True:
        alive = worker.is_alive()  # asked before the folder is read, so that the last model is not missed
        for cell in comparison.finished():
            if (cell["method"], cell["seed"]) not in shown:
                shown.add((cell["method"], cell["seed"]))
                _show(session, cell, time.monotonic() - began)
        if not alive:
            break
        time.sleep(POLL)
    _summary(session, comparison.finished())
    if failure:
        raise failure[0]


def _show(session: Session, cell: dict[str, Any], seconds: float) -> None:
    losses = cell["training"]["losses"]
    curve = [round(statistics.fmean(losses[at : at + 50]), 4) for at in range(0, len(losses), 50)]
    session.put(
        what="model",
        model=cell["method"],
        seed=cell["seed"],
        exact_match=cell["exact_match"],
        perplexity=cell["perplexity"],
        examples=cell["examples"],
        layers=cell["layers"],
        removed=cell["removed"],
        last_loss=statistics.fmean(losses[-20:]),
        training_seconds=cell["training_seconds"],
        done_after_s=seconds,
        losses_of_50_steps=curve,
    )


def _summary(session: Session, cells: list[dict[str, Any]]) -> None:
    by_seed = {name: {c["seed"]: c["exact_match"] for c in cells if c["method"] == name} for name in (DENSE, OURS)}
    both = sorted(by_seed[DENSE].keys() & by_seed[OURS].keys())
    if both:
        dense, pruned = ([by_seed[name][seed] for seed in both] for name in (DENSE, OURS))
        session.put(
            what="mean over seeds",
            seeds=both,
            dense=statistics.fmean(dense),
            pruned=statistics.fmean(pruned),
            of_dense=statistics.fmean(pruned) / statistics.fmean(dense) if any(dense) else None,
        )


def joined(model: Path, scratch: Path) -> Path:
    """The model file itself, or the pieces in a folder put together in the order of their names."""
    if model.is_file():
        return model
    pieces = sorted(path for path in model.iterdir() if path.is_file()) if model.is_dir() else []
    if not pieces:
        raise ValueError(f"--model {str(model)!r}: expected a GGUF file, or a folder of its pieces")
    whole = scratch / "model.gguf"
    with whole.open("wb") as target:
        for piece in pieces:
            with piece.open("rb") as source:
                shutil.copyfileobj(source, target)
    with whole.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"--model {str(model)!r}: the pieces {[p.name for p in pieces]} do not begin as a GGUF")
    return whole


def _examples(session: Session) -> tuple[Sequence[Example], Sequence[Example]]:
    train, *rest = session.data
    limit = 12 if session.tiny else None
    found = load_examples(train, prompt=PROMPT, answer=ANSWER, limit=limit, seed=0)
    if rest:
        return found, load_examples(rest[0], prompt=PROMPT, answer=ANSWER, limit=limit)
    cut = max(1, len(found) // 5)
    return found[cut:], found[:cut]
