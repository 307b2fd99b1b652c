"""The options that say how to fine-tune, and the recipe that they describe."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from gradpruner.cli.config_file import SetArguments
from gradpruner.errors import InvalidArgument

# options that are fields of TrainingArguments under another name
FIELDS = {
    "optimizer": "optim",
    "scheduler": "lr_scheduler_type",
    "gradient_checkpointing": "gradient_checkpointing",
    "report_to": "report_to",
    "run_name": "run_name",
}
PATTERN = frozenset("*+?()[]|\\^$")  # a name of a module has none of these


def recipe_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how to fine-tune, and what is reported meanwhile."""
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, metavar="N", help="optimizer steps")
    length.add_argument("--epochs", type=float, metavar="N", help="times that the training data is seen")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="examples per batch (default 16)")
    parser.add_argument(
        "--accumulation", type=int, default=1, metavar="N", help="batches per optimizer step (default 1)"
    )
    parser.add_argument(
        "--lr", "--learning-rate", type=float, default=1e-4, metavar="R", help="peak learning rate (default 1e-4)"
    )
    parser.add_argument("--weight-decay", type=float, default=0.1, metavar="W", help="weight decay (default 0.1)")
    parser.add_argument(
        "--warmup",
        type=float,
        default=0.03,
        metavar="P",
        help="share of the steps in which the learning rate rises, or a whole number of steps (default 0.03)",
    )
    parser.add_argument(
        "--scheduler", metavar="S", help="schedule of the learning rate, such as cosine (default linear)"
    )
    parser.add_argument(
        "--optimizer", metavar="O", help="optim of TrainingArguments, such as adafactor (default AdamW)"
    )
    parser.add_argument("--rank", type=int, default=8, metavar="R", help="LoRA rank; 0 trains all weights (default 8)")
    parser.add_argument("--alpha", type=int, default=32, metavar="A", help="LoRA's alpha (default 32)")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P", help="LoRA's dropout (default 0)")
    parser.add_argument(
        "--target-modules",
        nargs="+",
        metavar="M",
        help="linears of the decoder layers that get adapters: names, or one regular expression (default: all)",
    )
    parser.add_argument("--dora", action="store_true", help="adapters are DoRA")
    parser.add_argument("--rslora", action="store_true", help="LoRA's scale is alpha / sqrt(rank)")
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="compute activations twice: less memory, more time"
    )
    parser.add_argument("--group-by-length", action="store_true", help="batch rows of similar length: less padding")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of data order and adapters (default 0)")
    parser.add_argument(
        "--training-arguments",
        "--set",
        action=SetArguments,
        dest="training_arguments",
        metavar="NAME=VALUE",
        help="a field of transformers' TrainingArguments; may be repeated (in a file: a mapping training_arguments)",
    )
    parser.add_argument(
        "--report-to", nargs="+", metavar="T", help="trackers: tensorboard, wandb, mlflow, trackio, ... (default none)"
    )
    parser.add_argument("--run-name", metavar="N", help="name of the run in the trackers (default: that of --out)")


def recipe_of(options: argparse.Namespace) -> Any:
    """Return the recipe that the options of `recipe_options` describe."""
    from gradpruner.training.recipe import Recipe

    fields = dict(options.training_arguments or {})
    for option, field in FIELDS.items():
        value = getattr(options, option)
        if value in (None, False):
            continue
        if field in fields and str(fields[field]) != str(value):
            raise InvalidArgument(
                f"{option} = {value!r}, and training_arguments have {field} = {fields[field]!r}; expected one of them"
            )
        fields[field] = value
    norm = {}
    if "max_grad_norm" in fields:  # the recipe's own
        from gradpruner.training.trainer_fields import typed_arguments

        norm = typed_arguments({"max_grad_norm": fields.pop("max_grad_norm")})
    return Recipe(
        batch_size=options.batch_size,
        accumulation=options.accumulation,
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        warmup=options.warmup,
        rank=options.rank,
        alpha=options.alpha,
        seed=options.seed,
        group_by_length=options.group_by_length,
        dropout=options.dropout,
        target_modules=_targets(options.target_modules),
        dora=options.dora,
        rslora=options.rslora,
        trainer_arguments=fields,
        **norm,
    )


def _targets(words: list[str] | None) -> tuple[str, ...] | str | None:
    """Return one word with a sign of regular expressions as such, and other words as names."""
    if words is None:
        return None
    return words[0] if len(words) == 1 and PATTERN & set(words[0]) else tuple(words)


def steps_of(options: argparse.Namespace, rows: Sequence[Any]) -> int:
    """Return --steps, or the steps that --epochs stands for.

    Args:
        options: with those of `recipe_options`.
        rows: the examples that are trained on.
    """
    if options.epochs is None:
        return int(options.steps)
    from gradpruner.training.schedule import steps_of_epochs

    return steps_of_epochs(rows, options.epochs, recipe_of(options))
