"""The `transformers.TrainingArguments` of a recipe.

This module is imported when a training begins, because transformers.Trainer is slow to import.
"""

from __future__ import annotations

import logging

from transformers import TrainingArguments

from gradpruner.distributed.launch import launched
from gradpruner.errors import InvalidArgument
from gradpruner.training.recipe import Recipe
from gradpruner.training.shares import share_of
from gradpruner.training.trainer_fields import defaults

logger = logging.getLogger(__name__)


def training_arguments(
    recipe: Recipe,
    folder: str,
    *,
    schedule_steps: int,
    save_steps: int | None,
    bf16: bool,
    quiet: bool,
) -> TrainingArguments:
    """Return the Trainer's arguments for a recipe, on one device per process.

    Args:
        recipe: batch size, learning rate and the like. Its `trainer_arguments` are added.
        folder: where the Trainer may write.
        schedule_steps: optimizer steps of the learning-rate schedule.
        save_steps: optimizer steps between two checkpoints, or None for no checkpoints.
        bf16: whether to compute in bfloat16 (autocast), if the recipe does not say.
        quiet: whether to show no progress bar.

    Raises:
        InvalidArgument: the rows of a step cannot be divided over the launched processes, or the recipe's fields do
            not fit.
    """
    share = share_of(recipe, launched())
    given = dict(recipe.trainer_arguments)
    for name in ("gradient_checkpointing", "activation_checkpointing"):  # the second is transformers' newer name
        if given.get(name) and not given.get(f"{name}_kwargs"):
            given[f"{name}_kwargs"] = {"use_reentrant": False}  # reentrant, it gives adapters no gradient
    fields = {
        "lr_scheduler_type": "linear",
        "bf16": bf16 and not given.get("fp16"),
        "disable_tqdm": quiet,
        **defaults(),
        **given,
        "output_dir": folder,
        "max_steps": schedule_steps,
        "per_device_train_batch_size": share.batch_size,
        "gradient_accumulation_steps": share.accumulation,
        "learning_rate": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "warmup_steps": recipe.warmup_steps(schedule_steps),
        "max_grad_norm": recipe.max_grad_norm,
        "save_strategy": "no" if save_steps is None else "steps",
        "save_steps": 1 if save_steps is None else save_steps,
        "report_to": [],  # see gradpruner.training.trackers
        "seed": recipe.seed,
    }
    try:
        arguments = TrainingArguments(**fields)
    except (ValueError, ImportError) as error:
        raise InvalidArgument(f"training_arguments: {' '.join(str(error).split())}") from error
    use_one_device(arguments)
    return arguments


def use_one_device(arguments: TrainingArguments) -> None:
    """Make one optimizer step see `Recipe.rows_per_step` rows, each of them once.

    In one process with several GPUs, transformers would give every GPU a batch of its own.
    """
    if arguments.n_gpu > 1:
        logger.warning(
            f"{arguments.n_gpu} GPUs are visible; this run trains on one of them, {arguments.device}. To use all, "
            f"start it with torchrun --nproc-per-node {arguments.n_gpu} (docs/launchers.md)"
        )
        arguments._n_gpu = 1  # as the Trainer itself sets it where it must not use DataParallel
