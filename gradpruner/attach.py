"""attach: probe, cut and go on inside one run of somebody else's `transformers.Trainer`, checkpoints included."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from gradpruner.adapters import check_can_be_fresh, describe, without_adapters
from gradpruner.checkpoint import PLAN_FILE, save
from gradpruner.cut import check_wrappers, cut
from gradpruner.decoder import Decoder, altered_base, peft_of
from gradpruner.distributed import peers_of, together
from gradpruner.errors import CheckpointError, InvalidArgument, ModelMismatch, UnsupportedModel
from gradpruner.files import read_json, write_json
from gradpruner.igia import SCORES, Igia
from gradpruner.merge import share_of
from gradpruner.plan import Plan, select
from gradpruner.probe import Probe
from gradpruner.streaming import apply_folder
from gradpruner.surgery import prepare
from gradpruner.training_files import (
    FOLDER,
    SNAPSHOT,
    TRAINER_STATE,
    full_precision,
    is_complete,
    is_quantised,
    load_merged,
    mark_of,
    newest_complete,
)

logger = logging.getLogger(__name__)


def attach(
    trainer: Trainer,
    steps: int = 40,
    ratio: float | None = 0.4,
    *,
    count: int | None = None,
    of: str = "layers",
    kind: str = "squared",
    merge: str | int = "auto",
    protect: Iterable[int] = (0,),
    top: float = 0.2,
    weight: float = 1.0,
    estimator: str = "auto",
    factor_dtype: torch.dtype = torch.float32,
    micro_batches: int = 1,
) -> PruneCallback:
    """Make a Trainer probe its first `steps` optimizer steps, cut its model, and train on to the end, in one run.

    The step count, the learning-rate schedule, logging, evaluation and checkpoints go on as if nothing had happened;
    adapters start anew. Scores and plan are logged to whatever the Trainer reports to. A checkpoint, of any moment,
    resumes with `trainer.train(resume_from_checkpoint=...)` after the same `attach` on the same dense model; True
    takes the newest that is complete. output_dir/gradpruner holds the plan, the scores, and, where adapters
    train, the cut base model that their checkpoints belong to (and name).

    ratio, count, of, kind, merge, protect: see `Igia.plan`. top, weight: see `apply`. The rest: see `Probe`.
    Returns the callback, whose `plan` and `igia` can be read after the cut. Raises InvalidArgument,
    UnsupportedModel; what only the prepared model shows (its optimizer, say) is refused when training begins.
    """
    if not isinstance(trainer, Trainer):
        raise InvalidArgument(f"trainer is a {type(trainer).__name__}; expected a transformers.Trainer")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InvalidArgument(f"steps = {steps!r}; expected a number of optimizer steps, 1 or more")
    if any(isinstance(callback, PruneCallback) for callback in trainer.callback_handler.callbacks):
        raise InvalidArgument("trainer: gradpruner is attached already; expected a Trainer without it")
    share_of(top)
    if kind not in SCORES:
        raise InvalidArgument(f"kind = {kind!r}; accepted are {', '.join(SCORES)}")
    wanted = dict(ratio=None if count is not None else ratio, count=count, of=of, merge=merge, protect=tuple(protect))
    probe = dict(estimator=estimator, factor_dtype=factor_dtype, micro_batches=micro_batches, importance=merge != 0)
    callback = PruneCallback(trainer, steps, kind, wanted, dict(top=top, weight=weight), probe)
    if trainer.model is not None:
        callback.check(trainer.model)
    trainer.train = callback.train  # type: ignore[method-assign]
    trainer._load_from_checkpoint = callback.load_from_checkpoint  # type: ignore[method-assign]
    trainer._save_checkpoint = callback.save_checkpoint  # type: ignore[method-assign]
    trainer.add_callback(callback)
    return callback


class PruneCallback(TrainerCallback):
    """What `attach` adds to a Trainer: `plan` and `igia` after the cut."""

    def __init__(
        self,
        trainer: Trainer,
        steps: int,
        kind: str,
        wanted: dict[str, Any],
        merging: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        self.plan: Plan | None = None
        self.igia: Igia | None = None
        self._trainer, self._steps, self._kind = trainer, steps, kind
        self._wanted, self._merging, self._options = wanted, merging, options
        self._probe: Probe | None = None
        self._seen: Igia | None = None  # by the run that is resumed
        self._base: Path | None = None
        self._train, self._load, self._save = trainer.train, trainer._load_from_checkpoint, trainer._save_checkpoint

    def check(self, model: Any) -> None:
        """Raises InvalidArgument or UnsupportedModel for what can be told before training."""
        trainer, peft = self._trainer, peft_of(model)
        if trainer.is_deepspeed_enabled:
            raise UnsupportedModel(
                "trainer uses DeepSpeed, whose engine steps inside backward: probe in a loop of your own, with "
                "probe.record(engine.optimizer), and apply to the saved model"
            )
        if trainer.is_fsdp_enabled and getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
            raise UnsupportedModel(
                "trainer uses FSDP version 1, whose flat parameters cannot be cut: use fsdp_version=2"
            )
        arguments, nodes = trainer.args, trainer.args.world_size // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if arguments.save_on_each_node and nodes > 1:
            raise InvalidArgument(
                "save_on_each_node = True: one process writes; expected a folder that all nodes share"
            )
        if arguments.push_to_hub and peft is not None:
            raise InvalidArgument(
                "push_to_hub = True: checkpoints of adapters name the cut base model, a folder on this machine; merge "
                "them after training and use gradpruner.push_to_hub"
            )
        altered = altered_base(model)
        if altered is not None:
            raise UnsupportedModel(f"{altered}; a cut discards what the probe trained, which would damage the model")
        if peft is not None:
            check_can_be_fresh(peft)
        decoder = Decoder(model)
        self._check_plans(decoder)
        if is_quantised(decoder):
            if self._wanted["merge"] != 0:
                raise InvalidArgument(
                    f"merge = {self._wanted['merge']!r}; the base is quantised, accepted is 0 (or probe with "
                    "ProbeCallback and merge into the full-precision checkpoint with apply_folder)"
                )
            full_precision(decoder)

    def _check_plans(self, decoder: Decoder) -> None:
        """That such a plan is possible, and that layers can be removed at all: better told now than after the probe."""
        count = len(decoder.layers)
        sizes = [decoder.parameters_of(j) for j in range(count)]
        accepted = {**self._wanted, "layer_parameters": sizes, "total_parameters": decoder.total_parameters()}
        rising = [float(j) for j in range(count)]
        falling = [*rising[:0:-1], float(count)]  # but for the last: that no layer needs another number proves nothing
        early, late = (select(scores, **accepted).kept for scores in (rising, falling))
        try:
            prepare(decoder, early)
        except UnsupportedModel:
            with contextlib.suppress(UnsupportedModel):  # where a vision tower feeds the first layers, say
                prepare(decoder, late)
                return
            raise

    # the Trainer's events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start to watch, unless the model is cut already."""
        model = kwargs["model"]
        if self.plan is not None and len(Decoder(model).layers) == len(self.plan.kept):
            return
        self.check(model)
        check_wrappers(self._trainer.model_wrapped)
        self.plan = self.igia = self._base = None  # of an earlier run of this Trainer
        left = self._steps - (self._seen.steps + self._seen.skipped if self._seen is not None else 0)
        if state.max_steps - state.global_step <= left:
            raise InvalidArgument(
                f"steps = {self._steps}: the run has {state.max_steps - state.global_step} steps left; expected some "
                "for the smaller model too"
            )
        if self._probe is not None:  # a run that was given up, by auto_find_batch_size say
            self._probe.abandon()
        self._probe = Probe(model, **self._options)
        self._probe.start(kwargs["optimizer"], self._steps, resume=self._seen)
        self._seen = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Cut after the last step of the probe."""
        if self._probe is None or not self._probe.finished:
            return
        self._probe.stop()
        igia, self._probe = self._probe.igia, None
        plan = igia.plan(kind=self._kind, **self._wanted)
        # as the loop calls it: its wrappers have to know; DataParallel makes its copies anew at each step
        wrapped: Any = self._trainer.model_wrapped
        model = kwargs["model"] if isinstance(wrapped, nn.DataParallel) else wrapped
        cut(model, self._trainer.optimizer, plan, igia, seed=args.seed, **self._merging)
        self.igia, self.plan = igia, plan
        self._keep(kwargs["model"], plan, igia)
        # a dense model's metric is not one of this model's, nor is its checkpoint
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        due = control.should_log
        self._trainer.log(self._figures(plan, igia))
        control.should_log = due  # the step's own figures are still to come

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the model where training ended early."""
        if self._probe is not None:
            logger.warning(f"training ended in step {self._probe.steps} of {self._steps} of the probe: nothing was cut")
            self._probe.abandon()
            self._probe = None

    # what goes to disk

    def _keep(self, model: Any, plan: Plan, igia: Igia) -> None:
        """Write plan and scores, and the cut base model where the Trainer will save adapters only."""
        arguments, peft, decoder = self._trainer.args, peft_of(model), Decoder(model)
        folder = Path(str(arguments.output_dir)) / FOLDER
        if arguments.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            plan.save(folder / "plan.json")
            dataclasses.replace(igia, importance={}).save(folder / "igia.safetensors")
        if peft is None:
            return
        # another run in the same place, with another cut, gets a base of its own
        name = f"base-{decoder.fingerprint(content=True)}-{mark_of(plan, self._merging)}"
        base = self._base = (folder / name).resolve()
        if is_quantised(decoder):
            with together(peers_of()):
                if arguments.should_save:
                    source = full_precision(decoder)
                    apply_folder(source, base, Plan(plan.layers, plan.removed), overwrite=True)
        else:
            tokenizer = getattr(self._trainer, "processing_class", None)
            save(without_adapters(decoder.base), base, tokenizer=tokenizer, plan=plan, overwrite=True)
        describe(peft, str(base))

    def _figures(self, plan: Plan, igia: Igia) -> dict[str, float]:
        figures = {
            "gradpruner/removed_layers": float(len(plan.removed)),
            "gradpruner/layer_ratio": plan.layer_ratio,
            "gradpruner/parameter_ratio": plan.parameter_ratio or 0.0,
            "gradpruner/margin": igia.margin(plan, self._kind, protect=self._wanted["protect"]),
        }
        fate = {**dict.fromkeys(plan.kept, 0.0), **dict.fromkeys(plan.drop, 1.0), **dict.fromkeys(plan.merge, 2.0)}
        for layer, score in enumerate(igia.layer_scores(self._kind).tolist()):
            figures[f"gradpruner/score/{layer:02d}"] = score
            figures[f"gradpruner/fate/{layer:02d}"] = fate[layer]  # 0 kept, 1 dropped, 2 merged
        return figures

    # the Trainer's methods that a cut concerns

    def save_checkpoint(self, model: Any, trial: Any) -> None:
        """Ours go before the Trainer's own files: its last one then says that the checkpoint is whole."""
        trainer = self._trainer
        folder = Path(trainer._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
        if trainer.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            for stale in (TRAINER_STATE, SNAPSHOT, PLAN_FILE):  # of a run that was killed here before
                (folder / stale).unlink(missing_ok=True)
            if self.plan is not None:
                base = None if self._base is None else os.path.relpath(self._base, folder.resolve())
                write_json(folder / PLAN_FILE, {**self.plan.to_dict(), "base": base})
        if self._probe is not None and self._probe.steps:
            self._probe.snapshot().save(folder / SNAPSHOT)
        self._save(model, trial)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Resume only from a checkpoint that was written to the end."""
        self._seen = None
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_complete(str(self._trainer.args.output_dir))
        elif resume_from_checkpoint and not is_complete(Path(resume_from_checkpoint)):
            raise CheckpointError(f"checkpoint {resume_from_checkpoint!r} is not complete: saving it was interrupted")
        return self._train(resume_from_checkpoint, *args, **kwargs)

    def load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Bring the model to the shape that the checkpoint has, then let the Trainer load it."""
        checkpoint, model = Path(resume_from_checkpoint), self._trainer.model if model is None else model
        if (checkpoint / PLAN_FILE).is_file():
            content = read_json(checkpoint / PLAN_FILE, "plan")
            self._rebuild(model, Plan.from_dict(content), checkpoint, content.get("base"))
        elif self.plan is not None and len(Decoder(model).layers) == len(self.plan.kept):
            raise ModelMismatch(f"checkpoint {str(checkpoint)!r} is of the dense model; the Trainer's is cut already")
        elif (checkpoint / SNAPSHOT).is_file():
            self._seen = Igia.load(checkpoint / SNAPSHOT, lazy=True)
        self._load(resume_from_checkpoint, model)

    def _rebuild(self, model: Any, plan: Plan, checkpoint: Path, base: str | None) -> None:
        peft = peft_of(model)
        if (base is None) != (peft is None):
            raise ModelMismatch(
                f"checkpoint {str(checkpoint)!r} is of a model {'without' if base is None else 'with'} adapters; "
                f"the Trainer's has {'none' if peft is None else 'some'}"
            )
        if self.plan != plan or len(Decoder(model).layers) != len(plan.kept):
            cut(model, self._trainer.optimizer, Plan(plan.layers, plan.removed, model=plan.model),
                seed=self._trainer.args.seed)  # fmt: skip
        if base is not None:
            self._base = (checkpoint / base).resolve()
            if not self._base.is_dir():
                raise CheckpointError(f"the cut base model {str(self._base)!r} of {str(checkpoint)!r} is gone")
            if plan.merge:
                load_merged(Decoder(model), plan, self._base)
            if self._base.name.rpartition("-")[0] != f"base-{Decoder(model).fingerprint(content=True)}":
                raise ModelMismatch(f"the base model is not that of {str(checkpoint)!r}: expected {self._base}")
            describe(peft, str(self._base))
        self.plan = plan
        folder = Path(str(self._trainer.args.output_dir)) / FOLDER
        if (folder / "plan.json").is_file() and Plan.load(folder / "plan.json") == plan:  # else of another run's
            self.igia = Igia.load(folder / "igia.safetensors")
