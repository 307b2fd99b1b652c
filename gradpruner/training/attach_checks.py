"""The options of `attach`, and whether a Trainer and its model allow them."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer

from gradpruner.checks import check_choice, check_int, exact_share
from gradpruner.errors import InvalidArgument, UnsupportedModel
from gradpruner.model.decoder import Decoder
from gradpruner.model.wrappers import altered_base, peft_of
from gradpruner.presets import Preset
from gradpruner.probe.igia import SCORES
from gradpruner.probe.probe import Probe
from gradpruner.pruning.adapters import check_adapters
from gradpruner.pruning.preflight import check_plan, check_save
from gradpruner.training.attach_trainers import check_other_models
from gradpruner.training.resume import full_precision, is_quantised

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PruneOptions:
    """The arguments of `attach`, sorted by what they are for.

    Args:
        steps: optimizer steps of the probe.
        selection: which layers are removed: keyword arguments of `Igia.plan`, except for the score.
        probe: keyword arguments of `Probe`.
        preset: how layers are scored and cut.
        patch_required: whether `patch=True` was given by name. Then a model that cannot be patched is refused.

    Raises:
        InvalidArgument: an argument is not accepted.
    """

    steps: int
    selection: Mapping[str, Any]
    probe: Mapping[str, Any]
    preset: Preset
    patch_required: bool

    def __post_init__(self) -> None:
        """Check what would otherwise be checked only after time was spent."""
        check_int("steps", self.steps, 1, "a number of optimizer steps")
        exact_share("top", self.preset.top)
        check_choice("kind", self.preset.kind, SCORES)

    @property
    def merging(self) -> dict[str, Any]:
        """The keyword arguments of `cut` that say how weights are merged."""
        return {"top": self.preset.top, "weight": self.preset.weight}

    def without_patches(self) -> PruneOptions:
        """Return the same options, but gaps are not patched."""
        return dataclasses.replace(self, preset=dataclasses.replace(self.preset, patch=False))


def check_trainer_and_model(trainer: Trainer, model: Any, options: PruneOptions) -> PruneOptions:
    """Check that a Trainer's run can be probed and cut.

    Args:
        trainer: the Trainer.
        model: its model, not yet wrapped.
        options: what is asked for.

    Returns:
        The options, without patches if the model cannot be patched. That is logged.

    Raises:
        InvalidArgument: an argument does not fit this Trainer or model.
        UnsupportedModel: the model or the way in which it is distributed cannot be cut, or this kind of Trainer would
            go on with a wrong second model.
        ProbeError: the layers cannot be compared by what the probe would watch.
    """
    peft = peft_of(model)
    _check_distribution(trainer)
    check_other_models(trainer, model)
    _check_arguments(trainer, options, has_adapters=peft is not None)
    altered = altered_base(model)
    if altered is not None:
        raise UnsupportedModel(f"{altered}: a cut cannot separate them. Accepted are adapters beside unchanged weights")
    if peft is not None:
        check_adapters(peft, options.preset.adapters)
    decoder = Decoder(model)
    check_plan(decoder, **options.selection)
    _check_scores(model, options)
    if is_quantised(decoder):
        if options.selection["merge"] != 0:
            raise InvalidArgument(
                f"merge = {options.selection['merge']!r}; the base is quantised, accepted is 0 (or probe with "
                "ProbeCallback and merge into the full-precision checkpoint with apply_folder)"
            )
        full_precision(decoder)
    elif peft is not None:  # the cut base is written beside the adapters
        check_save(decoder.base, getattr(trainer, "processing_class", None), Path(str(trainer.args.output_dir)))
    return _patched_or_not(decoder, options)


def _check_distribution(trainer: Trainer) -> None:
    if trainer.is_deepspeed_enabled:
        raise UnsupportedModel(
            "trainer uses DeepSpeed, whose engine steps inside backward: probe in a loop of your own, with "
            "probe.record(engine.optimizer), and apply to the saved model"
        )
    if trainer.is_fsdp_enabled and getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
        raise UnsupportedModel("trainer uses FSDP version 1, whose flat parameters cannot be cut: use fsdp_version=2")


def _check_arguments(trainer: Trainer, options: PruneOptions, *, has_adapters: bool) -> None:
    arguments = trainer.args
    nodes = arguments.world_size // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if arguments.save_on_each_node and nodes > 1:
        raise InvalidArgument("save_on_each_node = True: one process writes; expected a folder that all nodes share")
    if options.probe["estimator"] == "exact" and arguments.n_gpu > 1:
        raise InvalidArgument(
            "estimator = 'exact' reads what one backward pass computes, but the Trainer deals a batch out to "
            f"{arguments.n_gpu} GPUs (DataParallel); accepted are auto, lora, gradient and adam, or exact with one "
            "GPU visible (CUDA_VISIBLE_DEVICES)"
        )
    if arguments.push_to_hub and has_adapters:
        raise InvalidArgument(
            "push_to_hub = True: checkpoints of adapters name the cut base model, a folder on this machine; merge "
            "them after training and use gradpruner.push_to_hub"
        )


def _check_scores(model: Any, options: PruneOptions) -> None:
    """Check that a probe could compare the layers that may be removed."""
    probe = Probe(model, **{**options.probe, "importance": False})
    try:
        probe.check_comparable(options.selection["protect"])
    finally:
        probe.abandon()


def _patched_or_not(decoder: Decoder, options: PruneOptions) -> PruneOptions:
    """Leave patches out if they are not possible. Refuse if `patch=True` was given."""
    if is_quantised(decoder):
        reason = "the base is quantised, and nothing can be added to packed weights"
    elif getattr(decoder.config, "is_encoder_decoder", False):
        reason = "an encoder-decoder makes its decoder's inputs of the labels, which are not kept"
    else:
        return options
    if options.patch_required:
        raise UnsupportedModel(f"patch = True; {reason}: accepted is patch=False")
    if not options.preset.patch:
        return options
    logger.warning(f"gaps will not be patched: {reason}")
    return options.without_patches()
