"""One Trainer run that starts dense and ends pruned, beside the two-stage way on the same data and number of steps.

python -m benchmarks.runs.one_run --data train.csv --test-data test.csv --prompt 'Question: {text}\\nIntent:' \
    --answer '{category}'
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

import gradpruner
from benchmarks import plots, records
from benchmarks.records import FOLDER
from gradpruner.data.collator import Collator
from gradpruner.data.load import load_examples
from gradpruner.data.tokens import tokenize
from gradpruner.model.load import load_model
from gradpruner.report.tables import table as text_table
from gradpruner.storage.csv_files import write_lines
from gradpruner.training.evaluate import exact_match
from gradpruner.training.finetune import add_adapters, train
from gradpruner.training.recipe import Recipe
from gradpruner.training.schedule import schedule


class Clock(TrainerCallback):
    """Loss and seconds of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)

    def on_log(self, *args: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.losses.append(float(logs["loss"]))


def one_run(model: Any, tokenizer: Any, rows: Sequence[Any], recipe: Recipe, probing: int, options: Any) -> Any:
    """Dense at first, pruned at the end, in one Trainer run."""
    clock, attached = Clock(), []
    chosen = {"preset": "paper", "ratio": options["ratio"], "merge": options["merge"]}
    adapted = add_adapters(model, recipe)
    train(
        adapted,
        rows,
        Collator(tokenizer),
        recipe,
        callbacks=[clock],
        prepare=lambda trainer: attached.append(gradpruner.attach(trainer, probing, **chosen)),
    )
    return adapted.merge_and_unload(), clock, attached[0].plan  # type: ignore[operator]


def two_stages(model: Any, tokenizer: Any, rows: Sequence[Any], recipe: Recipe, probing: int, options: Any) -> Any:
    """A run to probe, `apply`, and a run of what the budget leaves."""
    clock, probe, head = Clock(), gradpruner.ProbeCallback(probing), probing * recipe.rows_per_step
    adapted = add_adapters(model, recipe)
    train(adapted, rows[:head], Collator(tokenizer), recipe, callbacks=[clock, probe])
    plan = options["plan"] or probe.igia.plan(options["ratio"], preset="paper", merge=options["merge"])
    smaller = add_adapters(gradpruner.apply(adapted, plan, probe.igia, preset="paper"), recipe)
    train(smaller, rows[head:], Collator(tokenizer), recipe, callbacks=[clock])
    return smaller.merge_and_unload(), clock, plan  # type: ignore[operator]


WAYS = {"one run": one_run, "two stages": two_stages}


def draw(path: Path, curves: dict[str, list[float]], probing: int) -> None:
    """Loss over steps, the cut marked."""
    figure = plots.blank(7, 4)
    axes = figure.add_subplot()
    for way, losses in curves.items():
        width = 5  # a running mean: single batches are noisy
        mean = [statistics.fmean(losses[max(0, i - width + 1) : i + 1]) for i in range(len(losses))]
        axes.plot(range(1, len(losses) + 1), mean, label=way)
    axes.axvline(probing, color="grey", linestyle=":", label="the cut")
    axes.set(xlabel="optimizer step", ylabel="training loss (mean of 5 steps)", yscale="log")
    axes.legend()
    plots.save(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", required=True)
    parser.add_argument("--test-data", required=True)
    parser.add_argument("--prompt")
    parser.add_argument("--answer")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--probe-steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--merge", default="auto")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--plan", help="a plan.json that the two-stage way takes instead of its own")
    parser.add_argument("--test-rows", type=int, help="default: all")
    parser.add_argument("--out", type=Path, default=FOLDER / "one_run.csv")
    options = parser.parse_args()
    recipe = Recipe(batch_size=options.batch_size, learning_rate=options.lr)
    chosen = {
        "ratio": options.ratio,
        "merge": options.merge if options.merge == "auto" else int(options.merge),
        "plan": gradpruner.Plan.load(options.plan) if options.plan else None,
    }
    examples = load_examples(options.data, prompt=options.prompt, answer=options.answer)
    tests = load_examples(options.test_data, prompt=options.prompt, answer=options.answer)[: options.test_rows]
    table, curves, lines = [], {}, []
    for way, run in ((way, WAYS[way]) for way in options.ways):
        model, tokenizer = load_model(options.model, dtype=torch.bfloat16)
        rows = schedule(tokenize(examples, tokenizer, max_length=128, train_on="answer"), options.steps, recipe)
        smaller, clock, plan = run(model, tokenizer, rows, recipe, options.probe_steps, chosen)
        tested = tokenize(tests, tokenizer, max_length=128)
        accuracy = exact_match(smaller, tested, collate=Collator(tokenizer), batch_size=options.batch_size)
        before, after = (clock.seconds[: options.probe_steps], clock.seconds[options.probe_steps :])
        print(f"{way}: {plan.summary()}", flush=True)
        curves[way] = clock.losses
        table.append(
            {
                "": way,
                "exact match": f"{accuracy:.3f}",
                "step before the cut (s)": f"{statistics.median(before):.3f}",
                "after (s)": f"{statistics.median(after):.3f}",
                "after / before": f"{statistics.median(after) / statistics.median(before):.2f}",
                "last 20 losses": f"{statistics.fmean(clock.losses[-20:]):.3f}",
            }
        )
        lines += [
            (way, i + 1, loss, seconds)
            for i, (loss, seconds) in enumerate(zip(clock.losses, clock.seconds, strict=True))
        ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rounded = [(way, step, round(loss, 4), round(seconds, 4)) for way, step, loss, seconds in lines]
    write_lines(options.out, ["way", "step", "loss", "seconds"], rounded)
    draw(options.out.with_suffix(".svg"), curves, options.probe_steps)
    print(f"{records.machine(torch.device('cpu'))}; {options.steps} steps of {options.batch_size}, {len(tests)} rows")
    print(text_table(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
