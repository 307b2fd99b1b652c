"""The standard fine-tuning run: transformers.Trainer and peft, configured. One order of data for every run."""

from __future__ import annotations

import contextlib
import inspect
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from gradpruner.errors import CheckpointError, GradPrunerError, InvalidArgument
from gradpruner.memory import peak_memory, reset_peak_memory
from gradpruner.model.adapter_targets import adapted_weights, as_named, check_adapted
from gradpruner.model.decoder import Decoder
from gradpruner.model.loss import IGNORED
from gradpruner.model.modes import evaluating
from gradpruner.model.parameter_counts import count_parameters
from gradpruner.model.wrappers import is_peft
from gradpruner.probe.coverage import Coverage
from gradpruner.pruning.adapter_merge import merged
from gradpruner.storage.provenance import digest
from gradpruner.training.checkpoints import Checkpoints, Completing, load_trained, save_trained, watched
from gradpruner.training.divergence import has_diverged
from gradpruner.training.master_weights import float32_masters, trains_in_half
from gradpruner.training.recipe import Recipe, Row

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """What a run did. losses: one a step. step_seconds: median. peak_bytes: host memory, or the GPU's.

    seconds: wall time. After an interruption, the time up to the checkpoint that was resumed is added.
    """

    steps: int
    losses: tuple[float, ...]
    step_seconds: float
    peak_bytes: int
    seconds: float

    @property
    def diverged(self) -> bool:
        """Whether the loss rose, see `has_diverged`: such a run is not a success."""
        return has_diverged(self.losses)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**asdict(self), "losses": [round(loss, 4) for loss in self.losses], "diverged": self.diverged}


def add_adapters(model: nn.Module, recipe: Recipe) -> nn.Module:
    """A PeftModel with LoRA on every linear of every decoder layer, routers left out (C).

    Raises UnsupportedModel where PEFT puts adapters elsewhere.
    """
    decoder = Decoder(model)
    targets = [decoder.path_of(weight).removesuffix(".weight") for weight in adapted_weights(decoder)]
    torch.manual_seed(recipe.seed)  # the same adapters whatever ran before
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=0.0,
        target_modules=targets,
        task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,  # peft calls that one
    )
    with as_named():
        adapted = get_peft_model(model, config)
    check_adapted(adapted, targets)
    return adapted


def check_comparable(model: nn.Module, recipe: Recipe, protect: Iterable[int] = (0,)) -> None:
    """Before any training: raises ProbeError where a probe on this recipe could not compare the layers of `model`.

    model: plain, all of its weights trainable where the recipe has no adapters.
    """
    decoder = Decoder(model)
    weights, estimator = (adapted_weights(decoder), "lora") if recipe.rank else (decoder.weights, "gradient")
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
    """Train `model` in place on rows already in order (see `schedule`), one pass.

    of_steps: steps of the run whose beginning this is: the learning rate goes as it would in that run. prepare: called
    with the Trainer before it trains: `attach`, say. checkpoints: where the training is saved while it runs. If a
    complete checkpoint is there, the training goes on from it and ends as if it had not been interrupted. The caller
    discards them once the result is on disk. Adapters in float32 on a bfloat16 model are multiplied in bfloat16
    (autocast), as on a GPU with bf16=True. Weights that train in bfloat16 or float16 are float32 meanwhile, and are
    multiplied in bfloat16. One device is used, also where several are visible.
    Raises InvalidArgument where the rows do not fill the last step, in several processes, or where the checkpoints
    belong to another training or do not fit on the disk; GradPrunerError if the loss is not finite.
    """
    steps, rest = divmod(len(ordered), recipe.rows_a_step)
    if not steps or rest:
        raise InvalidArgument(f"{len(ordered)} rows; expected a multiple of {recipe.rows_a_step}, the rows of a step")
    of_steps = steps if of_steps is None else of_steps
    if of_steps < steps:
        raise InvalidArgument(f"of_steps = {of_steps}; expected {steps} or more, the steps of the rows")
    watch, resumed = _Watch(steps), None
    if checkpoints is not None:
        checkpoints = checkpoints.also_from(rows=digest(list(ordered)), recipe=digest([recipe.to_dict(), of_steps]))
        resumed = checkpoints.newest()
        callbacks = [*callbacks, Completing(checkpoints, watch.state)]
    mixed = trains_in_half(model) or (
        any(p.dtype == torch.bfloat16 for p in model.parameters())
        and all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    )
    with (
        tempfile.TemporaryDirectory() as scratch,
        float32_masters(model),
        _input_as_it_is(model) if mixed else contextlib.nullcontext(),
    ):
        if checkpoints is not None:
            checkpoints.make_folder(model)
        arguments = TrainingArguments(
            output_dir=scratch if checkpoints is None else str(checkpoints.folder),
            max_steps=of_steps,
            bf16=mixed,
            use_cpu=not torch.accelerator.is_available(),  # else transformers takes bf16 for a GPU's
            per_device_train_batch_size=recipe.batch_size,
            gradient_accumulation_steps=recipe.accumulation,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            warmup_steps=round(recipe.warmup * of_steps),
            max_grad_norm=recipe.max_grad_norm,
            lr_scheduler_type="linear",
            logging_steps=1,
            logging_nan_inf_filter=False,
            logging_strategy="steps",
            save_strategy="no" if checkpoints is None else "steps",
            save_steps=1 if checkpoints is None else checkpoints.interval(steps),
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=quiet,
            seed=recipe.seed,
        )
        _use_one_device(arguments)
        trainer = _InOrder(
            model=model,
            args=arguments,
            train_dataset=list(ordered),
            data_collator=collate,
            callbacks=[watch, *callbacks],
        )
        for printer in ("ProgressCallback", "PrinterCallback"):
            _replace_printer(trainer, printer, quiet)
        if prepare is not None:
            prepare(trainer)
        reset_peak_memory()
        if resumed is not None:
            watch.restore(watched(resumed))
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    return Training(steps, tuple(watch.losses), statistics.median(watch.seconds), watch.peak, watch.wall)


def _use_one_device(arguments: TrainingArguments) -> None:
    """A step sees `rows_a_step` rows, each once. Raises InvalidArgument in several processes, which would share them.

    In one process with several GPUs, transformers would give every one of them a batch.
    """
    if arguments.world_size > 1:
        raise InvalidArgument(
            f"training was launched in {arguments.world_size} processes; accepted is one: gradpruner's own runs train "
            "on one device. For several, use gradpruner.attach in a training script of your own"
        )
    if arguments.n_gpu > 1:
        logger.warning(f"{arguments.n_gpu} GPUs are visible; this run trains on one of them, {arguments.device}")
        arguments._n_gpu = 1  # as the Trainer itself sets it where it must not use DataParallel


def _input_as_it_is(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Without it peft would widen every activation to the adapters' float32 first, and autocast narrow it again."""
    return disable_input_dtype_casting(model) if is_peft(model) else contextlib.nullcontext()


def finish(model: nn.Module) -> nn.Module:
    """The plain model after training: adapters folded into the weights. A plain model comes back as it is."""
    return merged(model) if is_peft(model) else model


class _InOrder(Trainer):
    """The Trainer, with the rows in the order in which they are given, and no logits of tokens without a label.

    The head and the softmax are a large part of the step of a model with few layers and a large vocabulary.
    """

    _answers_only: bool | None = None  # not known before the first batch

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self._answers_only is None:
            self._answers_only = can_skip_logits(self.accelerator.unwrap_model(model), inputs)
        inputs = answers_only(inputs) if self._answers_only else inputs
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (SafetensorError, RuntimeError, OSError) as error:  # a full disk: torch has a RuntimeError for it
            place = str(self.args.output_dir)
            raise CheckpointError(f"could not write a checkpoint in {place}: {error}; earlier ones are kept") from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what trains, bit for bit. The Trainer's own way renames weights and leaves out what it shares."""
        save_trained(self.accelerator.unwrap_model(self.model), Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint))

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        ordered: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(ordered)


def answers_only(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs, asking for logits of those positions only that predict a token with a label."""
    labels = nn.functional.pad(inputs["labels"], (0, 1), value=IGNORED)[:, 1:]
    positions = (labels != IGNORED).any(0).nonzero().flatten()
    return {**inputs, "logits_to_keep": positions, "shift_labels": labels[:, positions]}


def can_skip_logits(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether the loss of a row is the same from the logits of its answer: not every model knows the arguments."""
    plain = model.get_base_model() if is_peft(model) else model  # type: ignore[operator]
    if "logits_to_keep" not in inspect.signature(plain.forward).parameters:
        return False
    row = {name: value[:1] for name, value in inputs.items()}
    with evaluating(model):
        expected = model(**row).loss
        try:
            found = model(**answers_only(row)).loss
        except (TypeError, ValueError):  # labels and logits of unequal length
            return False
    return torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=1e-3)


class _Watch(TrainerCallback):
    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._began, self._peak = 0.0, 0
        self._started, self._before = time.perf_counter(), 0.0

    @property
    def wall(self) -> float:
        """Seconds, over all parts of a training that was interrupted."""
        return self._before + time.perf_counter() - self._started

    @property
    def peak(self) -> int:
        """Bytes, over all parts of a training that was interrupted."""
        return max(self._peak, peak_memory())

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return {"losses": self.losses, "seconds": self.seconds, "peak_bytes": self.peak, "wall": self.wall}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.losses, self.seconds = list(state["losses"]), list(state["seconds"])
        self._peak, self._before = state["peak_bytes"], state["wall"]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._began)
        control.should_training_stop = control.should_training_stop or state.global_step >= self.steps

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None:
            self.losses.append(float(loss))
            if not torch.isfinite(torch.tensor(float(loss))):
                raise GradPrunerError(f"the loss of step {state.global_step} is {loss}; lower the learning rate")


def _replace_printer(trainer: Trainer, name: str, quiet: bool) -> None:
    """The progress bar stays; one printed line a step goes."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == name:
            if name == "PrinterCallback" or quiet:
                trainer.remove_callback(callback)
            else:
                callback.on_log = lambda *args, **kwargs: None
