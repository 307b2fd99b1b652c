"""Measure what a model costs to train and to serve: time, memory, bytes, operations."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gradpruner.checkpoint.save import save
from gradpruner.compare.operations import training_operations
from gradpruner.compare.results import Cost
from gradpruner.data.collator import Collator
from gradpruner.distributed.launch import work_apart
from gradpruner.memory import peak_memory, reset_peak_memory
from gradpruner.model.accelerator import to_accelerator
from gradpruner.model.decoder import Decoder
from gradpruner.model.load import load_model
from gradpruner.plan import Plan
from gradpruner.pruning.apply import apply
from gradpruner.pruning.preflight import check_save
from gradpruner.training.answers_only import answers_only, can_skip_logits
from gradpruner.training.evaluate import generation_speed
from gradpruner.training.finetune import add_adapters, finish, train
from gradpruner.training.recipe import Recipe
from gradpruner.training.schedule import Row

STEPS, NEW_TOKENS = 8, 64  # optimizer steps that are timed, tokens that are generated


def measure(
    loading: dict[str, Any],
    plans: Sequence[Plan | None],
    rows: Sequence[Row],
    recipe: Recipe,
    *,
    beside: str | os.PathLike[str],
    rank_factor: int = 1,
    rounds: int = 3,
) -> list[Cost]:
    """Measure the costs of the model cut by each plan, in processes of their own, in turns.

    Each model, the dense one too, is first written as a checkpoint into a temporary folder, by a process of its own.
    The processes that measure load that and nothing else, so a pruned model's memory holds no page of the dense one.
    All of these checkpoints are on the disk together until the end.

    Seconds are medians over the rounds. Peaks count the memory beyond what a process held before the model was loaded.
    Generation is greedy, of one sequence and 64 tokens. Operations are those of `training_operations`, of one step.

    Args:
        loading: arguments of `load_model`.
        plans: which layers are removed, None for the dense model. Merging is left out: it changes only values, which do
            not change the costs.
        rows: training rows in order, those of at least 8 steps.
        recipe: how the dense model is trained.
        beside: existing folder that the temporary one is made in.
        rank_factor: widens the adapters of a cut model, see `Preset`. Default 1.
        rounds: how often each model is measured. Default 3.

    Returns:
        One `Cost` per plan, in their order.

    Raises:
        InvalidArgument: the disk has no room for a checkpoint.
    """
    costs: list[list[Cost]] = [[] for _ in plans]
    without_merging = [None if plan is None else Plan(plan.layers, plan.removed) for plan in plans]
    with (
        tempfile.TemporaryDirectory(prefix=".gradpruner-costs-", dir=beside) as scratch,
        multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool,
    ):
        folders = [str(Path(scratch, str(number))) for number in range(len(plans))]
        for plan, folder in zip(without_merging, folders, strict=True):
            pool.apply(_write, (loading, plan, folder))
        for _ in range(rounds):
            for costs_of_plan, plan, folder in zip(costs, without_merging, folders, strict=True):
                count = 0 if plan is None else len(plan.removed)
                widened = recipe if plan is None else recipe.widened(rank_factor)
                arguments = ({**loading, "source": folder}, count, rows[: STEPS * recipe.rows_per_step], widened)
                costs_of_plan.append(pool.apply(_measured, arguments))
    return [_median(costs_of_plan) for costs_of_plan in costs]


def _median(costs: Sequence[Cost]) -> Cost:
    columns = {name: [getattr(cost, name) for cost in costs] for name in asdict(costs[0])}
    return Cost(**{name: type(values[0])(statistics.median(values)) for name, values in columns.items()})


def _write(loading: dict[str, Any], plan: Plan | None, folder: str) -> None:
    """Write the model of `loading`, cut by `plan`, as a checkpoint."""
    work_apart()
    model, tokenizer = load_model(**loading)
    if plan is not None:
        model = apply(model, plan)
    check_save(model, tokenizer, Path(folder))
    save(model, folder, tokenizer=tokenizer)


def _measured(loading: dict[str, Any], count: int, rows: Sequence[Row], recipe: Recipe) -> Cost:
    """Measure the costs of a model from which `count` layers were removed before."""
    work_apart()
    reset_peak_memory()
    before = 0 if torch.cuda.is_available() else peak_memory()
    model, tokenizer = load_model(**loading)
    layers, parameters = len(Decoder(model).layers), {id(p): p for p in model.parameters()}
    stored = sum(p.numel() * p.element_size() for p in parameters.values())
    to_accelerator(model)
    reset_peak_memory()
    speed = generation_speed(model, tokenizer, new_tokens=NEW_TOKENS)
    generating = peak_memory() - before
    trained = add_adapters(model, recipe) if recipe.rank else model
    training = train(trained, rows, Collator(tokenizer), recipe, quiet=True)
    batch = {k: v.to(model.device) for k, v in Collator(tokenizer)(rows[: recipe.batch_size]).items()}
    batch = answers_only(batch) if can_skip_logits(trained, batch) else batch
    operations = training_operations(trained, batch)
    finish(trained)
    return Cost(
        layers=layers,
        count=count,
        train_step_seconds=training.step_seconds,
        train_peak_bytes=training.peak_bytes - before,
        generate_seconds=NEW_TOKENS / speed,
        generate_peak_bytes=generating,
        checkpoint_bytes=stored,
        train_flops=float(operations * recipe.accumulation),
    )
