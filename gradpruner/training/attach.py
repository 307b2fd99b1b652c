"""`attach`: probe, cut and go on inside one run of a `transformers.Trainer`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from gradpruner.checkpoint.save import PLAN_FILE
from gradpruner.distributed.processes import peers_of
from gradpruner.errors import CheckpointError, InvalidArgument, ModelMismatch
from gradpruner.model.decoder import Decoder
from gradpruner.plan import Plan, gaps
from gradpruner.presets import Preset
from gradpruner.probe.igia import Igia
from gradpruner.probe.probe import Probe
from gradpruner.pruning.cut import check_wrappers, cut
from gradpruner.pruning.patch import Patch, fit_patches
from gradpruner.training.attach_checks import PruneOptions, check_trainer_and_model
from gradpruner.training.probe_batches import Batch, ProbeBatches, load_batches, save_batches
from gradpruner.training.resume import (
    SNAPSHOT,
    CutState,
    is_complete,
    newest_complete,
    read_cut,
    rebuild_cut,
    remove_stale_files,
    saved_igia,
    write_cut,
    write_results,
)
from gradpruner.training.trackers import figures_of

logger = logging.getLogger(__name__)


def attach(
    trainer: Trainer,
    steps: int = 40,
    ratio: float | None = 0.4,
    *,
    count: int | None = None,
    of: str = "layers",
    protect: Iterable[int] = (0,),
    preset: str = "default",
    kind: str | None = None,
    merge: str | int | None = None,
    top: float | None = None,
    weight: float | None = None,
    patch: bool | None = None,
    adapters: str | None = None,
    estimator: str = "auto",
    factor_dtype: torch.dtype = torch.float32,
    micro_batches: int = 1,
) -> PruneCallback:
    """Make a Trainer probe its first steps, cut its model, and train on to the end, in one run.

    The step count, the learning-rate schedule, logging, evaluation and checkpoints continue as without a cut. Adapters
    continue too, or start anew with adapters="discard". Scores and plan are logged to whatever the Trainer reports to.

    To resume from a checkpoint of any step, call `attach` in the same way on the same dense model, and then
    `trainer.train(resume_from_checkpoint=...)`. True takes the newest complete checkpoint. The folder
    output_dir/gradpruner holds the plan and the scores. If adapters train, it also holds the cut base model that their
    checkpoints belong to and name.

    Some faults are only known when the model is prepared, such as those of its optimizer. They are raised when training
    begins.

    Args:
        trainer: a `transformers.Trainer` or a subclass, for example TRL's SFTTrainer.
        steps: optimizer steps of the probe. Default 40.
        ratio: share of the layers to remove, above 0 and below 1. Default 0.4.
        count: how many layers to remove. If it is given, `ratio` is not used.
        of: what `ratio` is a share of, "layers" or "parameters". Default "layers".
        protect: layers that are never removed, counted from 0. Default: the first.
        preset: how layers are scored and cut, "default" or "paper". See `gradpruner.presets.Preset`.
        kind: the layer score, if not the preset's: "norm", "squared" or "normalized".
        merge: how many removed layers are merged into others, or "auto", if not the preset's.
        top: share of a merged weight's entries that is used, above 0 and up to 1, if not the preset's.
        weight: factor of the merged entries, if not the preset's.
        patch: whether gaps get a linear patch, if not the preset's. It is fitted on the probe's batches. Each process
            keeps up to 131,072 of their tokens in host memory. A quantised base and an encoder-decoder cannot be
            patched. Then a warning is logged, or UnsupportedModel is raised if patch=True is given.
        adapters: "keep" what the probe trained, or "discard" it, if not the preset's.
        estimator: see `Probe`.
        factor_dtype: see `Probe`.
        micro_batches: see `Probe`.

    Returns:
        The callback. Its `plan` and `igia` can be read after the cut.

    Raises:
        InvalidArgument: an argument is not accepted, or does not fit this Trainer.
        UnsupportedModel: the model, or the way in which it is distributed, cannot be cut.
        ProbeError: the layers cannot be compared by what the probe would watch.
        CheckpointError: the output folder of the Trainer cannot be written.

    Example:
        pruning = gradpruner.attach(trainer, steps=40, ratio=0.4)
        trainer.train()
        print(pruning.plan.summary())

    Source: docs/method.md, sections 1 to 4.
    """
    if not isinstance(trainer, Trainer):
        raise InvalidArgument(f"trainer is a {type(trainer).__name__}; expected a transformers.Trainer")
    if any(isinstance(callback, PruneCallback) for callback in trainer.callback_handler.callbacks):
        raise InvalidArgument("trainer: gradpruner is attached already; expected a Trainer without it")
    settings = Preset.of(preset, kind=kind, merge=merge, top=top, weight=weight, patch=patch, adapters=adapters)
    options = PruneOptions(
        steps=steps,
        selection={
            "ratio": None if count is not None else ratio,
            "count": count,
            "of": of,
            "merge": settings.merge,
            "protect": tuple(protect),
        },
        probe={
            "estimator": estimator,
            "factor_dtype": factor_dtype,
            "micro_batches": micro_batches,
            "importance": settings.merge != 0,
        },
        preset=settings,
        patch_required=patch is True,
    )
    if trainer.model is not None:
        options = check_trainer_and_model(trainer, trainer.model, options)
    callback = PruneCallback(trainer, options)
    trainer.train = callback.train  # type: ignore[method-assign]
    trainer._load_from_checkpoint = callback.load_from_checkpoint  # type: ignore[method-assign]
    trainer._save_checkpoint = callback.save_checkpoint  # type: ignore[method-assign]
    trainer.add_callback(callback)
    return callback


class PruneCallback(TrainerCallback):
    """What `attach` adds to a Trainer.

    `plan`, `igia` and `base` can be read after the cut. They are None before.

    Args:
        trainer: the Trainer. Its `train`, `_load_from_checkpoint` and `_save_checkpoint` are replaced by `attach`.
        options: what `attach` was asked for.
    """

    def __init__(self, trainer: Trainer, options: PruneOptions) -> None:
        self.igia: Igia | None = None
        self._trainer, self._options = trainer, options
        self._cut: CutState | None = None
        self._probe: Probe | None = None
        self._batches: ProbeBatches | None = None
        # of a checkpoint within the probe, until training begins again
        self._resumed_igia: Igia | None = None
        self._resumed_batches: list[Batch] = []
        # the Trainer's own methods, which ours call
        self._trainer_train = trainer.train
        self._trainer_load_from_checkpoint = trainer._load_from_checkpoint
        self._trainer_save_checkpoint = trainer._save_checkpoint

    @property
    def plan(self) -> Plan | None:
        """The plan of the cut, None before it."""
        return None if self._cut is None else self._cut.plan

    @property
    def base(self) -> Path | None:
        """The folder of the cut base model of adapters, None before the cut."""
        return None if self._cut is None else self._cut.base

    def _is_cut(self, model: nn.Module) -> bool:
        return self._cut is not None and len(Decoder(model).layers) == len(self._cut.plan.kept)

    # the Trainer's events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start to watch, unless the model is cut already."""
        model = kwargs["model"]
        if self._is_cut(model):
            return
        self._options = check_trainer_and_model(self._trainer, model, self._options)
        check_wrappers(self._trainer.model_wrapped)
        self._cut = self.igia = None  # of an earlier run of this Trainer
        done = 0 if self._resumed_igia is None else self._resumed_igia.steps + self._resumed_igia.skipped
        steps_left = state.max_steps - state.global_step
        if steps_left <= self._options.steps - done:
            raise InvalidArgument(
                f"steps = {self._options.steps}: the run has {steps_left} steps left; expected some for the smaller "
                "model too"
            )
        if self._probe is not None:  # a run that was given up, for example by auto_find_batch_size
            self._stop_watching()
        self._probe = Probe(model, **self._options.probe)
        self._probe.start(kwargs["optimizer"], self._options.steps, resume=self._resumed_igia)
        if self._options.preset.patch:
            self._batches = ProbeBatches(self._resumed_batches)
            self._batches.watch(self._trainer.model_wrapped)  # outside of what is compiled or copied to other devices
        self._resumed_igia, self._resumed_batches = None, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Cut after the last step of the probe."""
        if self._probe is None or not self._probe.finished:
            return
        self._probe.stop()
        igia, batches = self._probe.igia, [] if self._batches is None else self._batches.batches
        self._stop_watching()
        preset, plan = self._options.preset, igia.plan(kind=self._options.preset.kind, **self._options.selection)
        # The model as the loop calls it, because a cut changes its wrappers too. DataParallel makes new copies in every
        # step.
        wrapped: Any = self._trainer.model_wrapped
        model = kwargs["model"] if isinstance(wrapped, nn.DataParallel) else wrapped
        patches = self._fit_patches(model, plan, batches)
        cut(
            model,
            self._trainer.optimizer,
            plan,
            igia,
            **self._options.merging,
            patches=patches,
            adapters=preset.adapters,
            seed=args.seed,
        )
        # the model is cut from here on, even if writing fails: it is not to be cut again
        self.igia = igia
        self._cut = CutState(plan, None, tuple((patch.weight.layer, patch.weight.name) for patch in patches))
        base = write_results(self._trainer, kwargs["model"], plan, igia, patches, self._options.merging)
        self._cut = dataclasses.replace(self._cut, base=base)
        # the metric and the checkpoint of the dense model are not those of the smaller one
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        should_log = control.should_log
        self._trainer.log(self._figures(plan, igia, patches))
        control.should_log = should_log  # the step's own figures are still to come

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the model if training ended within the probe."""
        if self._probe is not None:
            logger.warning(
                f"training ended in step {self._probe.steps} of {self._options.steps} of the probe: nothing was cut"
            )
            self._stop_watching()

    def _stop_watching(self) -> None:
        """Let go of the model and the optimizer, without asking other processes."""
        if self._probe is not None:
            self._probe.abandon()
        if self._batches is not None:
            self._batches.stop()
        self._probe = self._batches = None

    def _fit_patches(self, model: nn.Module, plan: Plan, batches: list[Batch]) -> list[Patch]:
        """Fit a patch for each gap of the plan, on the batches of the probe."""
        peers = peers_of()
        if not self._options.preset.patch:
            return []
        if not batches if peers is None else peers.any(not batches):
            logger.warning(
                "gaps are not patched: no call of the Trainer's model could be recorded, because its arguments have no "
                "known names, or its attention mask is no tensor"
            )
            return []
        patches = fit_patches(model, plan, batches)
        shares = ", ".join(f"{patch.unexplained:.3f} after layer {patch.weight.layer}" for patch in patches)
        logger.info(
            f"{len(patches)} of {len(gaps(plan))} gaps are patched; unexplained share of the error: {shares or 'all'}"
        )
        return patches

    def _figures(self, plan: Plan, igia: Igia, patches: list[Patch]) -> dict[str, float]:
        """Return what the Trainer logs about the cut."""
        options = self._options
        return figures_of(plan, igia, patches, kind=options.preset.kind, protect=options.selection["protect"])

    # the Trainer's methods that a cut concerns

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, but resume only from a checkpoint that was written to the end."""
        self._resumed_igia, self._resumed_batches = None, []
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_complete(str(self._trainer.args.output_dir))
        elif resume_from_checkpoint and not is_complete(Path(resume_from_checkpoint)):
            raise CheckpointError(f"checkpoint {resume_from_checkpoint!r} is not complete: saving it was interrupted")
        return self._trainer_train(resume_from_checkpoint, *args, **kwargs)

    def save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write our files, then the Trainer's own.

        The Trainer's last file then says that the checkpoint is complete.

        Args:
            model: as the Trainer passes it.
            trial: as the Trainer passes it.
        """
        trainer = self._trainer
        folder = Path(trainer._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
        if trainer.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            remove_stale_files(folder)
            if self._cut is not None:
                write_cut(folder, self._cut)
        if self._probe is not None and self._probe.steps:
            self._probe.snapshot().save(folder / SNAPSHOT)  # all wait here for the process that clears the folder
            if self._batches is not None:
                save_batches(self._batches.batches, folder, peers_of())
        self._trainer_save_checkpoint(model, trial)

    def load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Bring the model to the shape that the checkpoint has, then let the Trainer load it.

        Args:
            resume_from_checkpoint: the checkpoint's folder.
            model: as the Trainer passes it. Default: its own.
        """
        checkpoint, model = Path(resume_from_checkpoint), self._trainer.model if model is None else model
        if (checkpoint / PLAN_FILE).is_file():
            stored = read_cut(checkpoint)
            rebuild_cut(
                model,
                self._trainer.optimizer,
                stored,
                checkpoint,
                is_cut=self.plan == stored.plan and self._is_cut(model),
                adapters=self._options.preset.adapters,
                seed=self._trainer.args.seed,
            )
            self._cut = stored
            self.igia = saved_igia(Path(str(self._trainer.args.output_dir)), stored.plan) or self.igia
        elif self._is_cut(model):
            raise ModelMismatch(f"checkpoint {str(checkpoint)!r} is of the dense model; the Trainer's is cut already")
        elif (checkpoint / SNAPSHOT).is_file():
            self._resumed_igia = Igia.load(checkpoint / SNAPSHOT, lazy=True)
            self._resumed_batches = load_batches(checkpoint, peers_of()) if self._options.preset.patch else []
        self._trainer_load_from_checkpoint(resume_from_checkpoint, model)
