"""What a model of so many layers costs to train and to serve: time, peak memory, bytes, operations."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from gradpruner.data import Collator
from gradpruner.decoder import Decoder
from gradpruner.evaluate import generation_speed
from gradpruner.finetune import Recipe, Row, add_adapters, answers_only, can_skip_logits, finish, train
from gradpruner.memory import peak_memory, reset_peak_memory
from gradpruner.merge import apply
from gradpruner.models import load_model
from gradpruner.plan import Plan
from gradpruner.results import Cost

STEPS, NEW_TOKENS = 8, 64


def measure(loading: dict[str, Any], plans: Sequence[Plan | None], rows: Sequence[Row], recipe: Recipe, *,
            rank_factor: int = 1, rounds: int = 3) -> list[Cost]:  # fmt: skip
    """Costs of the model cut by each plan (None: dense), every one in processes of its own, in turns.

    Seconds are medians; peaks are what was held beyond the process before the model came; generation is of 64 tokens,
    greedily, one sequence; operations are those that torch counts in one training step.
    rank_factor: of the adapters of what is cut, see `Settings`. loading: arguments of `load_model`. rows: in order,
    those of at least 8 steps. A plan's merging is left out: it changes values, which cost nothing.
    """
    found: list[list[Cost]] = [[] for _ in plans]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for _ in range(rounds):
            for each, plan in zip(found, plans, strict=True):
                dropped = None if plan is None else Plan(plan.layers, plan.removed)
                width = recipe if plan is None else recipe.widened(rank_factor)
                each.append(pool.apply(_measured, (loading, dropped, rows[: STEPS * recipe.rows_a_step], width)))
    return [_median(each) for each in found]


def _median(costs: Sequence[Cost]) -> Cost:
    columns = {name: [getattr(cost, name) for cost in costs] for name in asdict(costs[0])}
    return Cost(**{name: type(values[0])(statistics.median(values)) for name, values in columns.items()})


def _measured(loading: dict[str, Any], plan: Plan | None, rows: Sequence[Row], recipe: Recipe) -> Cost:
    reset_peak_memory()
    before = 0 if torch.cuda.is_available() else peak_memory()
    model, tokenizer = load_model(**loading)
    count = 0 if plan is None else len(plan.removed)
    if plan is not None:
        model = apply(model, plan)
    layers, parameters = len(Decoder(model).layers), {id(p): p for p in model.parameters()}
    stored = sum(p.numel() * p.element_size() for p in parameters.values())
    if torch.cuda.is_available():
        model.to("cuda")
    reset_peak_memory()
    speed = generation_speed(model, tokenizer, new_tokens=NEW_TOKENS)
    generating = peak_memory() - before
    trained = add_adapters(model, recipe) if recipe.rank else model
    training = train(trained, rows, Collator(tokenizer), recipe, quiet=True)
    batch = {k: v.to(model.device) for k, v in Collator(tokenizer)(rows[: recipe.batch_size]).items()}
    batch = answers_only(batch) if can_skip_logits(trained, batch) else batch
    with FlopCounterMode(display=False) as counter:
        trained(**batch).loss.backward()
    finish(trained)
    return Cost(
        layers=layers,
        count=count,
        train_step_seconds=training.step_seconds,
        train_peak_bytes=training.peak_bytes - before,
        generate_seconds=NEW_TOKENS / speed,
        generate_peak_bytes=generating,
        checkpoint_bytes=stored,
        train_flops=float(counter.get_total_flops() * recipe.accumulation),
    )
