"""The standard fine-tuning run: `transformers.Trainer` and peft, configured.

Every run takes the rows in one given order. transformers.Trainer and peft are slow to import, so they are imported when
a training begins.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from gradpruner.distributed.agreement import agree
from gradpruner.distributed.fsdp import take_back, twin
from gradpruner.distributed.launch import wants_shards
from gradpruner.distributed.processes import Peers, peers_of
from gradpruner.errors import InvalidArgument
from gradpruner.memory import reset_peak_memory
from gradpruner.model.accelerator import to_accelerator
from gradpruner.model.adapter_targets import adapted_weights, as_named, check_adapted
from gradpruner.model.decoder import Decoder
from gradpruner.model.parameter_counts import count_parameters
from gradpruner.model.wrappers import is_peft
from gradpruner.probe.coverage import Coverage
from gradpruner.pruning.adapter_merge import merged
from gradpruner.storage.provenance import digest
from gradpruner.training.checkpoints import Checkpoints, recorded_state
from gradpruner.training.divergence import has_diverged
from gradpruner.training.master_weights import float32_masters, trains_in_half
from gradpruner.training.recipe import Recipe
from gradpruner.training.schedule import Row, digest_of_rows
from gradpruner.training.shares import share_of

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from gradpruner.training.row_trainer import StepRecorder


@dataclass(frozen=True)
class Training:
    """The record of one training run.

    Args:
        steps: optimizer steps made.
        losses: training loss of each step, in nats per labelled token.
        step_seconds: median duration of a step, in seconds. In several processes, that of the slowest in each step.
        peak_bytes: peak memory in bytes: of the GPU if there is one, otherwise of the process. In several processes,
            that of the largest.
        seconds: wall time. After an interruption, the time up to the checkpoint that was resumed is added.
        processes: how many processes trained together, at most, if the training was interrupted.
    """

    steps: int
    losses: tuple[float, ...]
    step_seconds: float
    peak_bytes: int
    seconds: float
    processes: int = 1

    @property
    def diverged(self) -> bool:
        """Whether the loss rose (see `has_diverged`). Such a run is not a success."""
        return has_diverged(self.losses)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON holds it."""
        return {**asdict(self), "losses": [round(loss, 4) for loss in self.losses], "diverged": self.diverged}


def add_adapters(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Put LoRA adapters on the linears of the decoder layers that the recipe names.

    Args:
        model: a plain transformers model.
        recipe: what the adapters are. By default they are on every linear, except routers.

    Returns:
        The PeftModel around `model`.

    Raises:
        InvalidArgument: the recipe names a linear that no decoder layer has.
        UnsupportedModel: PEFT puts the adapters elsewhere.

    Source: docs/method.md, section 1.
    """
    from peft import LoraConfig, get_peft_model

    decoder = Decoder(model)
    weights = adapted_weights(decoder, recipe.target_modules)
    targets = [decoder.path_of(weight).removesuffix(".weight") for weight in weights]
    torch.manual_seed(recipe.seed)  # the same adapters whatever ran before
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        use_dora=recipe.dora,
        use_rslora=recipe.rslora,
        target_modules=targets,
        task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,  # peft calls that one
    )
    with as_named():
        adapted = get_peft_model(model, config)
    check_adapted(adapted, targets)
    return adapted


def check_comparable(model: nn.Module, recipe: Recipe, protect: Iterable[int] = (0,)) -> None:
    """Check that a probe with this recipe can compare the layers of a model.

    Args:
        model: the plain model. If the recipe has no adapters, all of its weights train.
        recipe: its rank says whether adapters train, or all weights.
        protect: layers that are never removed. Default: the first.

    Raises:
        ProbeError: it cannot. The message names the layers.
    """
    decoder = Decoder(model)
    adapted = adapted_weights(decoder, recipe.target_modules) if recipe.rank else None
    weights, estimator = (decoder.weights, "gradient") if adapted is None else (adapted, "lora")
    Coverage.of(decoder, weights, estimator, counts=count_parameters(decoder)).check_comparable(protect)


def train(
    model: nn.Module,
    ordered: Sequence[Row],
    collate: Callable[[Any], Any],
    recipe: Recipe,
    *,
    of_steps: int | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    prepare: Callable[[Trainer], object] | None = None,
    checkpoints: Checkpoints | None = None,
    quiet: bool = False,
) -> Training:
    """Train `model` in place, once over rows that are already in order.

    Adapters in float32 on a bfloat16 model are multiplied in bfloat16 (autocast), as on a GPU with bf16=True. Weights
    that train in bfloat16 or float16 are float32 meanwhile, and are multiplied in bfloat16. Each process uses one
    device. Several processes share the rows of every step. If the launcher asks for FSDP2, a copy of the model is
    sharded, and `model` gets the trained weights at the end.

    Args:
        model: a plain model or a PEFT model. The parameters that require a gradient are trained.
        ordered: the rows in the order of their use, as `schedule` returns them.
        collate: makes a batch of a list of rows.
        recipe: how to train.
        of_steps: steps of the longer run that this is the beginning of. The learning rate is that run's. Default: the
            steps of the rows.
        callbacks: more callbacks for the Trainer.
        prepare: called with the Trainer before it trains, for example `gradpruner.attach`. Not with FSDP2.
        checkpoints: where the training is saved while it runs. From a complete checkpoint there, the training goes on
            and ends as if it had not been interrupted. The caller discards the checkpoints once the result is on disk.
        quiet: whether to show no progress bar.

    Returns:
        The record of the run.

    Raises:
        InvalidArgument: the rows do not fill the last step, the rows of a step cannot be divided over the processes,
            or the checkpoints belong to another training or do not fit on the disk.
        GradPrunerError: the loss is not finite.
    """
    from gradpruner.training import row_trainer
    from gradpruner.training.trainer_arguments import training_arguments

    steps, rest = divmod(len(ordered), recipe.rows_per_step)
    if not steps or rest:
        raise InvalidArgument(f"{len(ordered)} rows; expected a multiple of {recipe.rows_per_step}, the rows of a step")
    of_steps = steps if of_steps is None else of_steps
    if of_steps < steps:
        raise InvalidArgument(f"of_steps = {of_steps}; expected {steps} or more, the steps of the rows")
    peers, sharded = peers_of(), wants_shards()
    share = share_of(recipe, 1 if peers is None else peers.size)
    if sharded and prepare is not None:
        raise InvalidArgument("prepare is given, and the launcher asks for FSDP2; expected one of them")
    agree("the rows or the recipe", [of_rows := digest_of_rows(ordered), recipe.to_dict(), of_steps])
    recorder, resumed = row_trainer.StepRecorder(steps), None
    if checkpoints is not None:
        checkpoints = checkpoints.also_from(rows=of_rows, recipe=digest([recipe.to_dict(), of_steps]))
        resumed = checkpoints.newest()
        callbacks = [*callbacks, row_trainer.CheckpointCompleter(checkpoints, recorder.state)]
    bf16 = _computes_in_bfloat16(model)
    with (
        tempfile.TemporaryDirectory() as scratch,
        float32_masters(model),
        _keeping_cache(model),
        _narrow_inputs(model) if bf16 else contextlib.nullcontext(),
    ):
        if checkpoints is not None:
            checkpoints.make_folder(model)
        arguments = training_arguments(
            recipe,
            scratch if checkpoints is None else str(checkpoints.folder),
            schedule_steps=of_steps,
            save_steps=None if checkpoints is None else checkpoints.interval(steps),
            bf16=bf16,
            quiet=quiet,
        )
        _check_launcher(arguments, peers)
        trainer = row_trainer.RowTrainer(
            model=twin(model) if sharded else model,
            args=arguments,
            train_dataset=ordered,
            data_collator=collate,
            callbacks=[recorder, *callbacks],
        )
        trainer.check_divisible(recipe, share)
        row_trainer.show_progress_bar_only(trainer, quiet)
        if prepare is not None:
            prepare(trainer)
        reset_peak_memory()
        if resumed is not None:
            recorder.restore(recorded_state(resumed))
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        if sharded:
            take_back(model, cast(nn.Module, trainer.model))
            to_accelerator(model)  # as the Trainer does with a model that is not sharded
    return _record(recorder, steps, peers)


def _check_launcher(arguments: TrainingArguments, peers: Peers | None) -> None:
    """Check that transformers sees the processes that share the rows, and no others.

    Raises InvalidArgument if it takes the variables of another launcher for processes of this training.
    """
    shared = 1 if peers is None else peers.size
    if arguments.world_size != shared:
        raise InvalidArgument(
            f"transformers finds {arguments.world_size} processes in the environment, and {shared} share this "
            "training; expected torchrun or accelerate launch for one training in several processes"
        )


def _record(recorder: StepRecorder, steps: int, peers: Peers | None) -> Training:
    """Return what was recorded, the largest figures of all processes."""
    own = (recorder.seconds, recorder.peak_bytes, recorder.wall_seconds)
    seconds, peaks, walls = zip(*([own] if peers is None else peers.gather(own)), strict=True)
    slowest = [max(of_step) for of_step in zip(*seconds, strict=True)]
    return Training(
        steps, tuple(recorder.losses), statistics.median(slowest), max(peaks), max(walls), recorder.processes
    )


def _computes_in_bfloat16(model: nn.Module) -> bool:
    """Return whether half-precision weights train, or float32 adapters on a bfloat16 model."""
    return trains_in_half(model) or (
        any(p.dtype == torch.bfloat16 for p in model.parameters())
        and all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    )


@contextlib.contextmanager
def _keeping_cache(model: nn.Module) -> Iterator[None]:
    """Give the config its `use_cache` back, which the Trainer switches off for good."""
    config: Any = getattr(model, "config", None)
    there, before = hasattr(config, "use_cache"), getattr(config, "use_cache", None)
    try:
        yield
    finally:
        if there:
            config.use_cache = before
        elif hasattr(config, "use_cache"):
            del config.use_cache


def _narrow_inputs(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Keep peft from widening activations to float32, which autocast would narrow again."""
    from peft.helpers import disable_input_dtype_casting

    return disable_input_dtype_casting(model) if is_peft(model) else contextlib.nullcontext()


def finish(model: nn.Module, base: nn.Module | None = None) -> nn.Module:
    """Return the plain model after a training, with its adapters added to the weights.

    Args:
        model: the model that was trained.
        base: the same model in full precision, if the adapters were trained on quantised weights. They are added to its
            weights. Default: they are added to the weights beside them.
    """
    if base is None:
        return merged(model) if is_peft(model) else model
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder, as_named():
        model.save_pretrained(folder)  # type: ignore[operator]
        plain = merged(PeftModel.from_pretrained(cast(Any, base), folder))
    to_accelerator(plain)
    return plain
