"""The `transformers.Trainer` of `gradpruner.training.finetune`, and its callbacks.

This module is imported when a training begins, because transformers.Trainer and peft are slow to import.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, trainer_pt_utils
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from gradpruner.distributed.fsdp import resharding
from gradpruner.distributed.launch import wants_shards
from gradpruner.distributed.processes import first, peers_of, wait_for_all
from gradpruner.errors import CheckpointError, GradPrunerError, InvalidArgument
from gradpruner.memory import peak_memory
from gradpruner.model.loss import IGNORED
from gradpruner.model.wrappers import is_peft
from gradpruner.storage.files import write_json
from gradpruner.storage.provenance import MADE_FROM, RECORD
from gradpruner.training.answers_only import answers_only, can_skip_logits
from gradpruner.training.checkpoints import PREFIX, Checkpoints, delete_checkpoint, load_trained, save_trained
from gradpruner.training.optimizer_state import divided_state, gathered_state
from gradpruner.training.recipe import Recipe
from gradpruner.training.shares import Share


class RowTrainer(Trainer):
    """A Trainer that takes the rows in their given order and skips logits without a label.

    In several processes, each takes its share of the rows of every step: accelerate deals consecutive batches out.
    """

    _skips_logits: bool | None = None  # not known before the first batch
    _divides_batches = False  # whether the processes share every forward pass

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, which shards where the launcher asks for it.

        On CPUs, accelerate would take DDP whatever it is asked for.
        """
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if wants_shards() and not self.is_fsdp_enabled:
            from accelerate import FullyShardedDataParallelPlugin
            from accelerate.utils import DistributedType

            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
            if state.mixed_precision != "no":
                state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
            self.is_fsdp_enabled = True

    def check_divisible(self, recipe: Recipe, share: Share) -> None:
        """Check that the loss of a step is that of one process.

        Args:
            recipe: batch size and accumulation of one process.
            share: what this process takes of a step.

        Raises:
            InvalidArgument: the model takes the mean over each forward pass, and these are not those of one process.
        """
        processes = self.args.world_size
        self._divides_batches = share.batch_size * processes == recipe.batch_size
        dealt = share.batch_size == recipe.batch_size
        if processes > 1 and not (self.model_accepts_loss_kwargs or self._divides_batches or dealt):
            raise InvalidArgument(
                f"batch_size = {recipe.batch_size}, accumulation = {recipe.accumulation}, over {processes} processes: "
                f"{type(self.model).__name__} takes the mean loss of each forward pass, which would have other rows "
                f"than in one process; expected a batch_size or an accumulation that is a multiple of {processes}"
            )

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss from the logits of labelled tokens where that gives the same loss.

        Args:
            model: the model as the loop calls it.
            inputs: one batch with labels.
            *args: passed on to the Trainer.
            **kwargs: passed on to the Trainer.
        """
        peers = peers_of()
        if self._skips_logits is None and self.label_smoother is not None:
            passes = self.args.gradient_accumulation_steps * self.args.world_size
            check_smoothed(self.accelerator.unwrap_model(model), passes)
            self._skips_logits = False  # the smoothed loss is not the model's own: it pairs all logits with all labels
        if self._skips_logits is None:
            plain = self.accelerator.unwrap_model(model)
            with resharding(plain):
                can = can_skip_logits(plain, inputs)
            self._skips_logits = can if peers is None else not peers.any(not can)
        weight = 1.0
        if peers is not None and self._divides_batches and not self.model_accepts_loss_kwargs:
            weight = _share_of_tokens(inputs["labels"], peers.size, self.accelerator)
        inputs = answers_only(inputs) if self._skips_logits else inputs
        result: Any = super().compute_loss(model, inputs, *args, **kwargs)
        return result if weight == 1.0 else result * weight

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (SafetensorError, RuntimeError, OSError) as error:  # a full disk: torch has a RuntimeError for it
            place = str(self.args.output_dir)
            raise CheckpointError(f"could not write a checkpoint in {place}: {error}; earlier ones are kept") from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the parameters that train, bit for bit.

        The Trainer's own way renames weights and omits shared ones. A sharded model is gathered.

        Args:
            output_dir: where to. Default: the Trainer's output_dir.
        """
        folder = Path(output_dir or str(self.args.output_dir))
        save_trained(self.accelerator.unwrap_model(self.model), folder, writes=self.is_world_process_zero())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        writes, scheduler = self.is_world_process_zero(), cast(Any, self.lr_scheduler)
        state = gathered_state(self.optimizer, keep=writes)
        if writes:
            torch.save(state, Path(output_dir, OPTIMIZER_NAME))
            torch.save(scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer, scheduler = cast(Any, self.optimizer), cast(Any, self.lr_scheduler)
        state = torch.load(Path(checkpoint, OPTIMIZER_NAME), map_location="cpu", weights_only=True)
        optimizer.load_state_dict(divided_state(optimizer, state))
        scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        ordered: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(ordered)


def _share_of_tokens(labels: torch.Tensor, processes: int, accelerator: Any) -> float:
    """Return the weight of this process's mean loss.

    With it, the mean over the processes is that of all tokens. It is for a model that takes the mean over its own
    batch, whatever other batches the step has.
    """
    tokens = (labels[:, 1:] != IGNORED).sum()
    total = accelerator.reduce(tokens.clone(), reduction="sum")
    return float(tokens) * processes / float(total)


def check_smoothed(model: Any, passes: int) -> None:
    """Raise InvalidArgument if transformers would smooth this model's loss wrongly.

    Args:
        model: the model, not wrapped by accelerate.
        passes: forward passes of an optimizer step, in all processes.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    plain = model.get_base_model() if is_peft(model) else model
    if type(plain).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise InvalidArgument(
            f"label_smoothing_factor: transformers smooths the loss of a {type(plain).__name__} at the wrong tokens; "
            "expected 0 for this model"
        )
    whole = "num_items_in_batch" in inspect.signature(trainer_pt_utils.LabelSmoother.__call__).parameters
    if passes > 1 and not whole:
        raise InvalidArgument(
            f"label_smoothing_factor with {passes} forward passes in a step: this transformers takes the mean "
            "of each of them and does not divide by their number; expected a newer transformers, accumulation = 1 in "
            "one process, or label_smoothing_factor 0"
        )


class StepRecorder(TrainerCallback):
    """Record loss and duration of every step, and stop the training after `steps` steps.

    Args:
        steps: optimizer steps to make. The learning-rate schedule may be that of a longer run.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._step_began, self._earlier_peak = 0.0, 0
        self._began, self._earlier_seconds = time.perf_counter(), 0.0
        peers = peers_of()
        self.processes = 1 if peers is None else peers.size  # the most that took part, over all parts of the training

    @property
    def wall_seconds(self) -> float:
        """Wall time in seconds, over all parts of a training that was interrupted."""
        return self._earlier_seconds + time.perf_counter() - self._began

    @property
    def peak_bytes(self) -> int:
        """Peak memory in bytes of this process, over all parts of a training that was interrupted."""
        return max(self._earlier_peak, peak_memory())

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return {
            "processes": self.processes,
            "losses": self.losses,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "wall": self.wall_seconds,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.losses, self.seconds = list(state["losses"]), list(state["seconds"])
        self._earlier_peak, self._earlier_seconds = state["peak_bytes"], state["wall"]
        self.processes = max(self.processes, state.get("processes", 1))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._step_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the duration of the step; stop after the last one."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._step_began)
        control.should_training_stop = control.should_training_stop or state.global_step >= self.steps

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Note the loss of the step. Raises GradPrunerError if it is not finite."""
        loss = (logs or {}).get("loss")
        if loss is not None:
            self.losses.append(float(loss))
            if not torch.isfinite(torch.tensor(float(loss))):
                raise GradPrunerError(f"the loss of step {state.global_step} is {loss}; lower the learning rate")


class CheckpointCompleter(TrainerCallback):
    """Complete every checkpoint that the Trainer saves.

    Its files are synced to disk, its record is written, and older checkpoints are deleted.

    Args:
        checkpoints: where they are.
        state: returns what else the training must remember, as JSON holds it.
    """

    def __init__(self, checkpoints: Checkpoints, state: Callable[[], dict[str, Any]]) -> None:
        self._checkpoints, self._state = checkpoints, state

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete the checkpoint that was just saved, once every process has written its part."""
        wait_for_all()
        first(lambda: self._complete(state))

    def _complete(self, state: Any) -> None:
        folder = self._checkpoints.folder
        newest = folder / f"{PREFIX}-{state.global_step}"
        for file in newest.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        # the record is written last: a checkpoint with a record is complete
        write_json(newest / RECORD, {MADE_FROM: dict(self._checkpoints.made_from), "watched": self._state()})
        for path in folder.glob(f"{PREFIX}-*"):
            if path != newest:
                delete_checkpoint(path)


def show_progress_bar_only(trainer: Trainer, quiet: bool) -> None:
    """Keep the Trainer's progress bar, but not the line that it prints at every step.

    Args:
        trainer: the Trainer to change.
        quiet: whether to remove the progress bar too.
    """
    for callback in list(trainer.callback_handler.callbacks):
        name = type(callback).__name__
        if name == "PrinterCallback" or (name == "ProgressCallback" and quiet):
            trainer.remove_callback(callback)
        elif name == "ProgressCallback":
            callback.on_log = lambda *args, **kwargs: None
