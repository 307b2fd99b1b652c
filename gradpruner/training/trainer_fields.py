"""The fields of `transformers.TrainingArguments` that a recipe may set, and their checks.

This module is imported when a field was set, because transformers.Trainer is slow to import.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from typing import Any, NoReturn, get_type_hints

import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments, get_scheduler

from gradpruner.errors import InvalidArgument

_EVALUATION = "the run evaluates at its end; evaluate a checkpoint with: gradpruner evaluate"
_LOGGING = "every step is logged, because the report needs the loss of every step"
_SAVING = "the newest checkpoint is kept; --save-steps says how often one is written"
_PUSH = "upload the result with: gradpruner push"
_ROWS = "the order of the rows is that of --data-seed, --seed and --group-by-length"
_PROCESSES = "the launcher decides, torchrun or accelerate launch"
# what the run decides itself, by the field, and what to use instead
DECIDED = {
    "output_dir": "use --out",
    "max_steps": "use --steps",
    "num_train_epochs": "use --epochs",
    "per_device_train_batch_size": "use --batch-size",
    "gradient_accumulation_steps": "use --accumulation",
    "learning_rate": "use --lr",
    "weight_decay": "use --weight-decay",
    "warmup_steps": "use --warmup",
    "warmup_ratio": "use --warmup",
    "max_grad_norm": "use max_grad_norm of the recipe",
    "seed": "use --seed",
    "save_steps": "use --save-steps",
    "auto_find_batch_size": "a smaller batch would be another training; use --batch-size and --accumulation",
    "remove_unused_columns": "rows have only the columns that the model takes",
    "label_names": "rows have only the columns that the model takes",
    "train_sampling_strategy": _ROWS,
    "group_by_length": "use --group-by-length",
    "length_column_name": _ROWS,
    "data_seed": _ROWS,
    "dataloader_drop_last": _ROWS,
    "ignore_data_skip": "a resumed training goes on with the next row",
    "resume_from_checkpoint": "the same command goes on from its newest checkpoint",
    "use_cpu": "hide the GPUs instead: CUDA_VISIBLE_DEVICES=",
    "local_rank": _PROCESSES,
    "deepspeed": "DeepSpeed hides the gradients from a run; use gradpruner.attach in a script of your own",
    "accelerator_config": _PROCESSES,
    "average_tokens_across_devices": "the loss of a step is the mean over all its tokens, whichever process has them",
    "parallelism_config": _PROCESSES,
    "fsdp": "use: accelerate launch",
    "fsdp_config": "use: accelerate launch",
    "save_strategy": _SAVING,
    "save_total_limit": _SAVING,
    "save_only_model": _SAVING,
    "save_on_each_node": _SAVING,
    "enable_jit_checkpoint": _SAVING,
    "restore_callback_states_from_checkpoint": _SAVING,
    "logging_strategy": _LOGGING,
    "logging_steps": _LOGGING,
    "logging_first_step": _LOGGING,
    "logging_nan_inf_filter": "a loss that is not finite ends the training",
    "use_cache": "the cache is off in training",
    "prediction_loss_only": _EVALUATION,
    "metric_for_best_model": _EVALUATION,
    "greater_is_better": _EVALUATION,
    "load_best_model_at_end": _EVALUATION,
    "include_for_metrics": _EVALUATION,
    "batch_eval_metrics": _EVALUATION,
    "per_device_eval_batch_size": _EVALUATION,
    "bf16_full_eval": _EVALUATION,
    "fp16_full_eval": _EVALUATION,
    "do_train": _EVALUATION,
    "do_eval": _EVALUATION,
    "do_predict": _EVALUATION,
    "push_to_hub": _PUSH,
}
_DECIDED_BEGINNINGS = {"eval_": _EVALUATION, "hub_": _PUSH}
# fields that report, log or load, and leave every weight as it would be
_BESIDE = (
    *("report_to", "run_name", "project", "trackio_", "disable_tqdm", "log_level", "log_on_each_node"),
    *("dataloader_", "include_num_input_tokens_seen", "skip_memory_metrics", "ddp_", "debug", "torch_empty_cache"),
)
_OPTIMIZERS = {
    "lomo": "it steps inside the backward pass, where a probe sees no gradient",
    "adalomo": "it steps inside the backward pass, where a probe sees no gradient",
    "layerwise": "it steps inside the backward pass, where a probe sees no gradient",
    "schedule_free": "the weights that it trains are not those that it would evaluate and save",
}


def changing(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that change the result of a training.

    Those that report, log or load are left out.
    """
    return {name: arguments[name] for name in sorted(arguments) if not name.startswith(_BESIDE)}


def typed_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Read fields of TrainingArguments as HfArgumentParser would.

    Args:
        given: values by field. Text is read by the type of the field: "1e-4", "true". A field whose value is None is
            left out: it has its default.

    Raises:
        InvalidArgument: there is no such field, or its value cannot be read.
    """
    types = get_type_hints(TrainingArguments)  # before the parser, which rewrites the types of the fields
    fields = [field.name for field in dataclasses.fields(TrainingArguments)]
    described: Any = TrainingArguments
    parser = _Parser(described, add_help=False, allow_abbrev=False)
    typed: dict[str, Any] = {}
    for name, value in given.items():
        if name not in fields:
            if name in DECIDED:  # of another version of transformers
                typed[name] = value
                continue
            near = difflib.get_close_matches(str(name), fields, n=1, cutoff=0.5)
            raise InvalidArgument(
                f"training_arguments: transformers.TrainingArguments has no {name!r}"
                f"{f'; did you mean {near[0]!r}?' if near else ''}"
            )
        if value is None:
            continue
        if "dict" in str(types[name]) and (isinstance(value, Mapping) or str(value).lstrip().startswith("{")):
            typed[name] = dict(value) if isinstance(value, Mapping) else _json(name, str(value))
            continue
        if isinstance(value, Mapping):
            raise InvalidArgument(f"training_arguments: {name} = {value!r}; expected one value, or a list of values")
        if isinstance(value, (list, tuple)) and "list" not in str(types[name]):
            raise InvalidArgument(f"training_arguments: {name} = {value!r}; expected one value")
        parser.reading = f"{name} = {value!r}"
        read = [parser.value(name, word) for word in (value if isinstance(value, (list, tuple)) else [value])]
        typed[name] = read if isinstance(value, (list, tuple)) else read[0]
    return typed


def checked_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of TrainingArguments as a recipe keeps them, after a trial of them.

    The optimizer and the schedule that they name are made once, so that a missing package or a wrong option is found
    before a model is loaded.

    Args:
        given: values by field, see `typed_arguments`.

    Raises:
        InvalidArgument: a field does not exist, has a wrong value, is decided by the run, or does not go with a probe.
    """
    typed = typed_arguments(given)
    for name in typed:
        instead = DECIDED.get(name) or next(
            (why for start, why in _DECIDED_BEGINNINGS.items() if name.startswith(start)), ""
        )
        if instead:
            raise InvalidArgument(f"training_arguments: {name} cannot be set: {instead}")
    for part, why in _OPTIMIZERS.items():
        if part in str(typed.get("optim", "")):
            raise InvalidArgument(f"training_arguments: optim = {str(typed['optim'])!r} cannot be watched: {why}")
    if typed.get("lr_scheduler_type") == "reduce_lr_on_plateau":
        raise InvalidArgument(
            "training_arguments: lr_scheduler_type = 'reduce_lr_on_plateau' needs an evaluation per "
            "step; expected a schedule of steps, such as 'linear', 'cosine' or 'constant'"
        )
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if typed.get(name, {}).get("use_reentrant"):
            raise InvalidArgument(
                f"training_arguments: {name}: use_reentrant = True gives adapters no gradient; expected False"
            )
    check_reporting(typed.get("report_to"))
    try:
        _try(typed)
    except (ValueError, TypeError, ImportError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InvalidArgument(f"training_arguments: {', '.join(typed)}: {reason}") from error
    return typed


def _try(typed: Mapping[str, Any]) -> None:
    """Make the arguments, the optimizer and the schedule. Raises what transformers raises."""
    arguments = TrainingArguments(output_dir="unused", **defaults(), **{**typed, "report_to": "none"})
    if "galore" not in arguments.optim and "apollo" not in arguments.optim:  # these two need the model
        made, of_it = Trainer.get_optimizer_cls_and_kwargs(arguments)
        made([torch.nn.Parameter(torch.zeros(1))], **of_it)
    options: Any = arguments.lr_scheduler_kwargs
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        num_warmup_steps=1,
        num_training_steps=10,
        scheduler_specific_kwargs=options,
    )


def check_reporting(report_to: Any) -> None:
    """Refuse trackers that transformers does not know, or whose package is missing.

    Args:
        report_to: as `TrainingArguments.report_to` takes it.

    Raises:
        InvalidArgument: a tracker cannot be used. The message names it.
    """
    from transformers.integrations import get_reporting_integration_callbacks

    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        try:
            for callback in get_reporting_integration_callbacks(name):
                callback()
        except ValueError as error:
            raise InvalidArgument(f"report_to = {name!r}: {error}") from None
        except (RuntimeError, ImportError) as error:
            raise InvalidArgument(
                f"report_to = {name!r}: its package is missing: pip install {name.replace('_', '-')} ({error})"
            ) from None


def defaults() -> dict[str, Any]:
    """Return the fields that every training of a run has."""
    return {
        "use_cpu": not torch.accelerator.is_available(),  # else transformers takes bf16 for a GPU's
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "logging_strategy": "steps",
        "remove_unused_columns": False,
    }


def _json(name: str, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InvalidArgument(f"training_arguments: {name} = {text!r} is no JSON object: {error}") from None
    return dict(content)


class _Parser(HfArgumentParser):
    """A parser that raises InvalidArgument and does not end the process."""

    reading = ""

    def value(self, name: str, word: Any) -> Any:
        """Return one word by the type of a field."""
        read = getattr(self.parse_args([f"--{name}={word}"]), name)
        return read[0] if isinstance(read, list) else read

    def error(self, message: str) -> NoReturn:
        raise InvalidArgument(f"training_arguments: {self.reading}: {message.partition(': ')[2] or message}")
