"""attach: probe, cut and go on inside one run of somebody else's `transformers.Trainer`, checkpoints included."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from gradpruner.checkpoint.save import PLAN_FILE, save
from gradpruner.checks import check_choice, check_int, exact_share
from gradpruner.distributed.processes import peers_of, together
from gradpruner.errors import CheckpointError, InvalidArgument, ModelMismatch, UnsupportedModel
from gradpruner.model.decoder import Decoder
from gradpruner.model.wrappers import altered_base, peft_of
from gradpruner.plan import Plan, gaps
from gradpruner.presets import Preset
from gradpruner.probe.igia import SCORES, Igia
from gradpruner.probe.probe import Probe
from gradpruner.pruning.adapters import check_adapters, describe, without_adapters
from gradpruner.pruning.apply_folder import apply_folder
from gradpruner.pruning.cut import check_wrappers, cut
from gradpruner.pruning.patch import Patch, fit_patches
from gradpruner.pruning.preflight import check_plan, check_save
from gradpruner.storage.files import read_json, reading, write_json
from gradpruner.training.probe_batches import FILES, Inputs, load_inputs, save_inputs
from gradpruner.training.resume import (
    FOLDER,
    SNAPSHOT,
    TRAINER_STATE,
    full_precision,
    is_complete,
    is_quantised,
    load_changed,
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
    """Make a Trainer probe its first `steps` optimizer steps, cut its model, and train on to the end, in one run.

    The step count, the learning-rate schedule, logging, evaluation and checkpoints go on as if nothing had happened;
    adapters go on too, or with adapters="discard" start anew. Scores and plan are logged to whatever the Trainer
    reports to. A checkpoint, of any moment, resumes with `trainer.train(resume_from_checkpoint=...)` after the same
    `attach` on the same dense model; True takes the newest that is complete. output_dir/gradpruner holds the plan, the
    scores, and, where adapters train, the cut base model that their checkpoints belong to (and name).
    patch: gaps are patched on the probe's batches, of which each process keeps up to 131,072 tokens in host memory. A
    quantised base and an encoder-decoder cannot be patched: that is logged, and refused where patch=True is given.

    ratio, count, of, protect: see `Igia.plan`. preset, and kind to adapters for what differs from it: see `Preset`.
    The rest: see `Probe`.
    Returns the callback, whose `plan` and `igia` can be read after the cut. Raises InvalidArgument, UnsupportedModel,
    ProbeError where layers cannot be compared by what the probe would watch; what only the prepared model shows (its
    optimizer, say) is refused when training begins.
    """
    if not isinstance(trainer, Trainer):
        raise InvalidArgument(f"trainer is a {type(trainer).__name__}; expected a transformers.Trainer")
    check_int("steps", steps, 1, "a number of optimizer steps")
    if any(isinstance(callback, PruneCallback) for callback in trainer.callback_handler.callbacks):
        raise InvalidArgument("trainer: gradpruner is attached already; expected a Trainer without it")
    settings = Preset.of(preset, kind=kind, merge=merge, top=top, weight=weight, patch=patch, adapters=adapters)
    exact_share("top", settings.top)
    check_choice("kind", settings.kind, SCORES)
    wanted = dict(
        ratio=None if count is not None else ratio, count=count, of=of, merge=settings.merge, protect=tuple(protect)
    )
    probe = dict(
        estimator=estimator, factor_dtype=factor_dtype, micro_batches=micro_batches, importance=settings.merge != 0
    )
    callback = PruneCallback(trainer, steps, settings, wanted, probe, insists=patch is True)
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
        settings: Preset,
        wanted: dict[str, Any],
        options: dict[str, Any],
        *,
        insists: bool,
    ) -> None:
        self.plan: Plan | None = None
        self.igia: Igia | None = None
        self._trainer, self._steps, self._settings = trainer, steps, settings
        self._wanted, self._options = wanted, options
        self._insists = insists  # on patches
        self._probe: Probe | None = None
        self._inputs: Inputs | None = None
        self._seen: Igia | None = None  # by the run that is resumed
        self._given: list[dict[str, Tensor]] = []  # to its model
        self._base: Path | None = None
        self._patched: list[tuple[int, str]] = []  # layer of the dense model, and name
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
        if self._options["estimator"] == "exact" and arguments.n_gpu > 1:
            raise InvalidArgument(
                "estimator = 'exact' reads what one backward pass computes, but the Trainer deals a batch out to "
                f"{arguments.n_gpu} GPUs (DataParallel); accepted are auto, lora, gradient and adam, or exact with one "
                "GPU visible (CUDA_VISIBLE_DEVICES)"
            )
        if arguments.push_to_hub and peft is not None:
            raise InvalidArgument(
                "push_to_hub = True: checkpoints of adapters name the cut base model, a folder on this machine; merge "
                "them after training and use gradpruner.push_to_hub"
            )
        altered = altered_base(model)
        if altered is not None:
            raise UnsupportedModel(f"{altered}, which a cut cannot tell apart from it")
        if peft is not None:
            check_adapters(peft, self._settings.adapters)
        decoder = Decoder(model)
        self._check_plans(decoder)
        self._check_scores(model)
        if is_quantised(decoder):
            if self._wanted["merge"] != 0:
                raise InvalidArgument(
                    f"merge = {self._wanted['merge']!r}; the base is quantised, accepted is 0 (or probe with "
                    "ProbeCallback and merge into the full-precision checkpoint with apply_folder)"
                )
            full_precision(decoder)
        elif peft is not None:  # the cut base is written beside the adapters
            check_save(decoder.base, getattr(trainer, "processing_class", None), Path(str(trainer.args.output_dir)))
        self._check_patch(decoder)

    def _check_scores(self, model: Any) -> None:
        """That the scores of the layers which may go can be compared, by what the probe will watch."""
        probe = Probe(model, **{**self._options, "importance": False})
        try:
            probe.check_comparable(self._wanted["protect"])
        finally:
            probe.abandon()

    def _check_patch(self, decoder: Decoder) -> None:
        """Do without patches where they are not possible, unless they were asked for by name."""
        if is_quantised(decoder):
            reason = "the base is quantised, and nothing can be added to packed weights"
        elif getattr(decoder.config, "is_encoder_decoder", False):
            reason = "an encoder-decoder makes its decoder's inputs of the labels, which are not kept"
        else:
            return
        if self._insists:
            raise UnsupportedModel(f"patch = True; {reason}: accepted is patch=False")
        if self._settings.patch:
            logger.warning(f"gaps will not be patched: {reason}")
            self._settings = dataclasses.replace(self._settings, patch=False)

    def _check_plans(self, decoder: Decoder) -> None:
        """That such a plan is possible, and that layers can be removed at all: better told now than after the probe."""
        check_plan(decoder, **self._wanted)

    # the Trainer's events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start to watch, unless the model is cut already."""
        model = kwargs["model"]
        if self.plan is not None and len(Decoder(model).layers) == len(self.plan.kept):
            return
        self.check(model)
        check_wrappers(self._trainer.model_wrapped)
        self.plan = self.igia = self._base = None  # of an earlier run of this Trainer
        self._patched = []
        left = self._steps - (self._seen.steps + self._seen.skipped if self._seen is not None else 0)
        if state.max_steps - state.global_step <= left:
            raise InvalidArgument(
                f"steps = {self._steps}: the run has {state.max_steps - state.global_step} steps left; expected some "
                "for the smaller model too"
            )
        if self._probe is not None:  # a run that was given up, by auto_find_batch_size say
            self._let_go()
        self._probe = Probe(model, **self._options)
        self._probe.start(kwargs["optimizer"], self._steps, resume=self._seen)
        if self._settings.patch:
            self._inputs = Inputs(self._given)
            self._inputs.watch(self._trainer.model_wrapped)  # outside of what is compiled or copied to other devices
        self._seen, self._given = None, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Cut after the last step of the probe."""
        if self._probe is None or not self._probe.finished:
            return
        self._probe.stop()
        igia, inputs = self._probe.igia, self._inputs
        self._let_go()
        settings, plan = self._settings, igia.plan(kind=self._settings.kind, **self._wanted)
        # as the loop calls it: its wrappers have to know; DataParallel makes its copies anew at each step
        wrapped: Any = self._trainer.model_wrapped
        model = kwargs["model"] if isinstance(wrapped, nn.DataParallel) else wrapped
        patches = self._fit(model, plan, [] if inputs is None else inputs.batches)
        cut(
            model,
            self._trainer.optimizer,
            plan,
            igia,
            top=settings.top,
            weight=settings.weight,
            patches=patches,
            adapters=settings.adapters,
            seed=args.seed,
        )
        self.igia, self.plan = igia, plan
        self._patched = [(patch.weight.layer, patch.weight.name) for patch in patches]
        self._keep(kwargs["model"], plan, igia, patches)
        # a dense model's metric is not one of this model's, nor is its checkpoint
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        due = control.should_log
        self._trainer.log(self._figures(plan, igia, patches))
        control.should_log = due  # the step's own figures are still to come

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the model where training ended early."""
        if self._probe is not None:
            logger.warning(f"training ended in step {self._probe.steps} of {self._steps} of the probe: nothing was cut")
            self._let_go()

    def _let_go(self) -> None:
        """Of the model and the optimizer; asks no other process."""
        if self._probe is not None:
            self._probe.abandon()
        if self._inputs is not None:
            self._inputs.stop()
        self._probe = self._inputs = None

    def _fit(self, model: nn.Module, plan: Plan, batches: list[dict[str, Tensor]]) -> list[Patch]:
        """The patches of the plan's gaps, on what the probe's steps saw."""
        peers = peers_of()
        if not self._settings.patch:
            return []
        if not batches if peers is None else peers.any(not batches):
            logger.warning("gaps are not patched: the Trainer's model was not called with keyword arguments")
            return []
        patches = fit_patches(model, plan, batches)
        shares = ", ".join(f"{patch.unexplained:.3f} after layer {patch.weight.layer}" for patch in patches)
        logger.info(
            f"{len(patches)} of {len(gaps(plan))} gaps are patched; unexplained share of the error: {shares or 'all'}"
        )
        return patches

    # what goes to disk

    def _keep(self, model: Any, plan: Plan, igia: Igia, patches: list[Patch]) -> None:
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
        merging = dict(top=self._settings.top, weight=self._settings.weight)
        name = f"base-{decoder.fingerprint(content=True)}-{mark_of(plan, merging, patches)}"
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

    def _figures(self, plan: Plan, igia: Igia, patches: list[Patch]) -> dict[str, float]:
        figures = {
            "gradpruner/removed_layers": float(len(plan.removed)),
            "gradpruner/layer_ratio": plan.layer_ratio,
            "gradpruner/parameter_ratio": plan.parameter_ratio or 0.0,
            "gradpruner/margin": igia.margin(plan, self._settings.kind, protect=self._wanted["protect"]),
            "gradpruner/gaps": float(len(gaps(plan))),
            "gradpruner/patched_gaps": float(len(patches)),
        }
        figures |= {f"gradpruner/unexplained/{patch.weight.layer:02d}": patch.unexplained for patch in patches}
        fate = {**dict.fromkeys(plan.kept, 0.0), **dict.fromkeys(plan.drop, 1.0), **dict.fromkeys(plan.merge, 2.0)}
        for layer, score in enumerate(igia.layer_scores(self._settings.kind).tolist()):
            figures[f"gradpruner/watched/{layer:02d}"] = igia.watched[layer]
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
            for stale_inputs in folder.glob(FILES):
                stale_inputs.unlink()
            if self.plan is not None:
                base = None if self._base is None else os.path.relpath(self._base, folder.resolve())
                write_json(folder / PLAN_FILE, {**self.plan.to_dict(), "base": base, "patched": self._patched})
        if self._probe is not None and self._probe.steps:
            self._probe.snapshot().save(folder / SNAPSHOT)  # all wait here for the process that clears the folder
            if self._inputs is not None:
                save_inputs(self._inputs.batches, folder, peers_of())
        self._save(model, trial)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Resume only from a checkpoint that was written to the end."""
        self._seen, self._given = None, []
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
            self._rebuild(model, Plan.from_dict(content), checkpoint, content)
        elif self.plan is not None and len(Decoder(model).layers) == len(self.plan.kept):
            raise ModelMismatch(f"checkpoint {str(checkpoint)!r} is of the dense model; the Trainer's is cut already")
        elif (checkpoint / SNAPSHOT).is_file():
            self._seen = Igia.load(checkpoint / SNAPSHOT, lazy=True)
            self._given = load_inputs(checkpoint, peers_of()) if self._settings.patch else []
        self._load(resume_from_checkpoint, model)

    def _rebuild(self, model: Any, plan: Plan, checkpoint: Path, content: dict[str, Any]) -> None:
        base, peft = content.get("base"), peft_of(model)
        if (base is None) != (peft is None):
            raise ModelMismatch(
                f"checkpoint {str(checkpoint)!r} is of a model {'without' if base is None else 'with'} adapters; "
                f"the Trainer's has {'none' if peft is None else 'some'}"
            )
        if self.plan != plan or len(Decoder(model).layers) != len(plan.kept):
            cut(
                model,
                self._trainer.optimizer,
                Plan(plan.layers, plan.removed, model=plan.model),
                adapters=self._settings.adapters,
                seed=self._trainer.args.seed,
            )
        with reading(str(checkpoint / PLAN_FILE)):
            self._patched = [(int(layer), str(name)) for layer, name in content.get("patched", ())]
        if base is not None:
            self._base = (checkpoint / base).resolve()
            if not self._base.is_dir():
                raise CheckpointError(f"the cut base model {str(self._base)!r} of {str(checkpoint)!r} is gone")
            if plan.merge or self._patched:
                load_changed(Decoder(model), plan, self._patched, self._base)
            if self._base.name.rpartition("-")[0] != f"base-{Decoder(model).fingerprint(content=True)}":
                raise ModelMismatch(f"the base model is not that of {str(checkpoint)!r}: expected {self._base}")
            describe(peft, str(self._base))
        self.plan = plan
        folder = Path(str(self._trainer.args.output_dir)) / FOLDER
        if (folder / "plan.json").is_file() and Plan.load(folder / "plan.json") == plan:  # else of another run's
            self.igia = Igia.load(folder / "igia.safetensors")
