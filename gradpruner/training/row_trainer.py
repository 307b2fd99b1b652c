"""The `transformers.Trainer` of `gradpruner.training.finetune`, and its callbacks.

This module is imported when a training begins, because transformers.Trainer and peft are slow to import.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback

from gradpruner.errors import CheckpointError, GradPrunerError, InvalidArgument
from gradpruner.memory import peak_memory
from gradpruner.model.wrappers import is_peft
from gradpruner.storage.files import write_json
from gradpruner.storage.provenance import MADE_FROM, RECORD
from gradpruner.training.answers_only import answers_only, can_skip_logits
from gradpruner.training.checkpoints import PREFIX, Checkpoints, delete_checkpoint, load_trained, save_trained


class RowTrainer(Trainer):
    """A Trainer that takes the rows in their given order and skips logits without a label."""

    _skips_logits: bool | None = None  # not known before the first batch

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss from the logits of labelled tokens where that gives the same loss.

        Args:
            model: the model as the loop calls it.
            inputs: one batch with labels.
            *args: passed on to the Trainer.
            **kwargs: passed on to the Trainer.
        """
        if self._skips_logits is None and self.label_smoother is not None:
            check_smoothed(self.accelerator.unwrap_model(model))
            self._skips_logits = False  # the smoothed loss is not the model's own: it pairs all logits with all labels
        if self._skips_logits is None:
            self._skips_logits = can_skip_logits(self.accelerator.unwrap_model(model), inputs)
        inputs = answers_only(inputs) if self._skips_logits else inputs
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (SafetensorError, RuntimeError, OSError) as error:  # a full disk: torch has a RuntimeError for it
            place = str(self.args.output_dir)
            raise CheckpointError(f"could not write a checkpoint in {place}: {error}; earlier ones are kept") from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the parameters that train, bit for bit.

        The Trainer's own way renames weights and omits shared ones.

        Args:
            output_dir: where to. Default: the Trainer's output_dir.
        """
        save_trained(self.accelerator.unwrap_model(self.model), Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint))

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        ordered: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(ordered)


def check_smoothed(model: Any) -> None:
    """Raise InvalidArgument if transformers would smooth this model's loss wrongly."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    plain = model.get_base_model() if is_peft(model) else model
    if type(plain).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise InvalidArgument(
            f"label_smoothing_factor: transformers smooths the loss of a {type(plain).__name__} at the wrong tokens; "
            "expected 0 for this model"
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

    @property
    def wall_seconds(self) -> float:
        """Wall time in seconds, over all parts of a training that was interrupted."""
        return self._earlier_seconds + time.perf_counter() - self._began

    @property
    def peak_bytes(self) -> int:
        """Peak memory in bytes, over all parts of a training that was interrupted."""
        return max(self._earlier_peak, peak_memory())

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return {
            "losses": self.losses,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "wall": self.wall_seconds,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.losses, self.seconds = list(state["losses"]), list(state["seconds"])
        self._earlier_peak, self._earlier_seconds = state["peak_bytes"], state["wall"]

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
        """Complete the checkpoint that was just saved."""
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
