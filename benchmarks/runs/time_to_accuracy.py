"""Accuracy over steps and over time, of the dense and the pruned model in one budget of steps.

python -m benchmarks.runs.time_to_accuracy --data train.csv \
    --prompt 'Question: {text}\\nIntent:' --answer '{category}' --steps 625 --lr 2e-3 --processes 2

Time is that of training, of the probe, of choosing and of cutting; looking at the held-out rows is not counted.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks import plots
from benchmarks.records import FOLDER
from gradpruner.data.collator import Collator
from gradpruner.data.examples import split_examples
from gradpruner.data.load import load_examples
from gradpruner.data.tokens import tokenize
from gradpruner.methods import Clues, parse_method
from gradpruner.model.decoder import Decoder
from gradpruner.model.load import load_model
from gradpruner.probe.selection import how_many
from gradpruner.report.tables import table as text_table
from gradpruner.run.stages import watch
from gradpruner.storage.csv_files import write_dicts
from gradpruner.training.evaluate import answers
from gradpruner.training.finetune import add_adapters, train
from gradpruner.training.recipe import Recipe
from gradpruner.training.schedule import schedule

DENSE, COLOURS = "dense", ("#1b1f24", "#0072B2", "#E69F00", "#009E73", "#CC79A7")


@dataclass(frozen=True)
class Point:
    """After `steps` optimizer steps and `seconds` of work: exact match and mean answer loss on held-out rows."""

    method: str
    steps: int
    seconds: float
    exact_match: float
    loss: float


class Looking(TrainerCallback):
    """Looks at held-out rows every so many steps, with the clock stopped."""

    def __init__(self, look: Any, before: int, seconds: float, every: int) -> None:
        self.look, self.before, self.every = look, before, every
        self._running, self._since = seconds, time.perf_counter()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        steps = self.before + state.global_step
        if steps % self.every == 0:
            self._running += time.perf_counter() - self._since
            self.look(model, steps, self._running)
            self._since = time.perf_counter()


def curve(method: str, options: argparse.Namespace) -> list[Point]:
    """The points of one method, or of "dense"."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // options.processes))
    model, tokenizer = load_model(options.model, dtype=torch.bfloat16, attention="eager")
    examples = load_examples(options.data, prompt=options.prompt, answer=options.answer)
    training, held = split_examples(examples, options.rows, 0)
    recipe = Recipe(options.batch_size, learning_rate=options.lr, seed=options.seed, group_by_length=True)
    rows = schedule(tokenize(training, tokenizer, max_length=options.max_length), options.steps, recipe)
    judged, collate, found = (
        tokenize(held, tokenizer, max_length=options.max_length),
        Collator(tokenizer),
        list[Point](),
    )

    def look(model: Any, steps: int, seconds: float) -> None:
        said = answers(model, judged, collate=collate, batch_size=32)
        right, loss = sum(answer.right for answer in said), sum(answer.loss for answer in said)
        found.append(
            Point(
                method,
                steps,
                round(seconds, 1),
                right / len(said),
                round(loss / sum(answer.tokens for answer in said), 4),
            )
        )
        print(*vars(found[-1]).values(), flush=True)

    before, began = 0, time.perf_counter()
    if method != DENSE:
        model = cut(method, model, tokenizer, rows[: options.probe_steps * recipe.rows_per_step], recipe, options)
        before = options.probe_steps
        recipe = recipe.widened(parse_method(method).settled("rank_factor"))
    seconds = time.perf_counter() - began if before else 0.0
    adapted = add_adapters(model, recipe)
    callback = Looking(look, before, seconds, options.every)
    train(adapted, rows[before * recipe.rows_per_step :], collate, recipe, callbacks=[callback], quiet=True)
    return found


def cut(text: str, model: Any, tokenizer: Any, rows: Sequence[Any], recipe: Recipe, options: Any) -> Any:
    """The smaller model, after the probe's steps."""
    watched, igia = watch(model, tokenizer, rows, recipe, of_steps=options.steps, quiet=True)
    method, collate, size = parse_method(text), Collator(tokenizer), recipe.batch_size
    if method.settled("adapters") != "keep":
        raise SystemExit(f"{text}: the probe's training would be thrown away; accepted are methods with adapters=keep")
    batches = [collate(rows[i : i + size]) for i in range(0, len(rows), size)]
    clues = Clues(watched, batches, (), recipe.seed, lambda: igia)
    plan = method.plan(clues, how_many(len(Decoder(model).layers), options.ratio))
    print(f"{text}: without {plan.removed}", flush=True)
    return method.cut(clues, plan)


def draw(path: Path, points: Sequence[Point]) -> None:
    """Exact match over steps, and over minutes."""
    figure = plots.blank(9, 4)
    for number, (what, unit) in enumerate((("steps", 1), ("seconds", 60)), 1):
        axes = figure.add_subplot(1, 2, number)
        for colour, method in zip(COLOURS, dict.fromkeys(p.method for p in points), strict=False):
            mine = [p for p in points if p.method == method]
            axes.plot(
                [getattr(p, what) / unit for p in mine],
                [p.exact_match for p in mine],
                marker="o",
                markersize=3,
                color=colour,
                label=method,
            )
        axes.set_xlabel("optimizer steps" if unit == 1 else "minutes of work, the probe's and the cut's too")
        axes.set_ylabel("exact match, held-out rows")
        axes.grid(color="#d9dee3", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    plots.save(figure, path)


def when(points: Sequence[Point]) -> list[dict[str, Any]]:
    """For shares of the last dense accuracy: the first time at which each method has it."""
    last = [p for p in points if p.method == DENSE][-1].exact_match
    rows = []
    for share in (0.9, 0.95, 0.98, 0.99, 1.0):
        row: dict[str, Any] = {"of dense": f"{share:.0%}", "exact match": f"{share * last:.3f}"}
        for method in dict.fromkeys(p.method for p in points):
            reached = [p for p in points if p.method == method and p.exact_match >= share * last]
            row[method] = f"{reached[0].seconds:.0f} s, {reached[0].steps} steps" if reached else "not reached"
        rows.append(row)
    return rows


def main() -> None:
    """Write the CSV and the SVG, print when each method gets how far."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--answer", required=True)
    parser.add_argument("--methods", nargs="+", default=["gradpruner"])
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--steps", type=int, default=625)
    parser.add_argument("--probe-steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--rows", type=int, default=500, help="held out of the data, to judge by")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="each with its share of the cores")
    parser.add_argument("--out", type=Path, default=FOLDER / "time_to_accuracy.csv")
    options = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=1) as pool:
        jobs = [pool.apply_async(curve, (method, options)) for method in (DENSE, *options.methods)]
        points = [point for job in jobs for point in job.get()]
    write_dicts(options.out, [asdict(point) for point in points])
    draw(options.out.with_suffix(".svg"), points)
    print(text_table(when(points)))


if __name__ == "__main__":
    main()
