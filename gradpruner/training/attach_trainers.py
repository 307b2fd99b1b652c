"""Refuse Trainers with a second model that a cut would make wrong."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer

from gradpruner.errors import UnsupportedModel
from gradpruner.model.wrappers import peft_of, unwrap

# Callbacks that keep a copy of the weights and go through it in the order of the model's parameters. After a cut, the
# same place in the two holds another layer. They are known by name, since their packages need not be installed.
COPYING_CALLBACKS = {
    "BEMACallback": "it averages the weights of the dense model",
    "MergeModelCallback": "it merges each checkpoint with the dense model",
    "PEFTAdapterEMACallback": "it averages the adapters of the dense model",
    "SyncRefModelCallback": "it copies the trained weights into the reference model, which stays dense",
    "SyncTeacherModelCallback": "it copies the trained weights into the teacher, which stays dense",
}
# Callbacks that train some layers at a time, and know them by their numbers in the dense model.
LAYERWISE_CALLBACKS = ("LISACallback", "LisaCallback", "BAdamCallback", "DynamicLayerActivationCallback")
# Trainers whose loop or whose workers never learn of a cut.
REFUSED_TRAINERS = {
    "PPOTrainer": "its loop steps the optimizer itself, and its value head shares the model's layers",
    "AsyncGRPOTrainer": "a vLLM server that is started with the dense model generates its completions",
    "AsyncDistillationTrainer": "a vLLM server that is started with the dense model generates its completions",
}


def check_other_models(trainer: Trainer, model: nn.Module) -> None:
    """Refuse a Trainer that would go on with a wrong second model after the cut.

    What a Trainer is gets read from its attributes, and by its name only where they do not tell.

    Args:
        trainer: the Trainer, as far as it is made: a callback may ask before its class has set all attributes.
        model: its model, not yet wrapped.

    Raises:
        UnsupportedModel: the message names the Trainer, the reason, and what to do.
    """
    name = type(trainer).__name__
    for kind in type(trainer).__mro__:
        if kind.__name__ in REFUSED_TRAINERS:
            raise UnsupportedModel(
                f"trainer is a {name}: {REFUSED_TRAINERS[kind.__name__]}. Probe with ProbeCallback where its loop "
                "allows it, and use apply_folder on the saved model"
            )
    _check_kind(name, model)
    _check_reference(trainer, name, model)
    _check_callbacks(trainer, name)
    if getattr(trainer, "use_vllm", False) or getattr(trainer.args, "use_vllm", False):
        raise UnsupportedModel(
            f"trainer is a {name} with use_vllm=True: vLLM holds the dense model, and the weights of a smaller one "
            "would be written into the wrong layers. Accepted is use_vllm=False"
        )
    _check_parallelism(trainer)


def _check_kind(name: str, model: nn.Module) -> None:
    """Refuse a module that only contains a transformers model.

    Its own files would describe the dense one.
    """
    base = unwrap(model)
    inner = [path for path, module in base.named_modules() if path and isinstance(module, PreTrainedModel)]
    alien = isinstance(base, nn.Sequential) or getattr(base, "config", None) is None
    if inner and alien and not isinstance(base, PreTrainedModel):
        raise UnsupportedModel(
            f"trainer is a {name}, whose model is a {type(base).__name__} around a transformers model ({inner[0]!r}): "
            "its checkpoints cannot be verified. Train the inner model with a transformers.Trainer, or prune it before"
        )


def _check_reference(trainer: Trainer, name: str, model: nn.Module) -> None:
    """Refuse a reference that is the trained model with other adapters, or none.

    A cut would change it too.
    """
    peft = peft_of(model)
    if peft is None:
        return
    way = "with the adapter 'ref'" if "ref" in getattr(peft, "peft_config", {}) else "with its adapters switched off"
    if getattr(trainer.args, "teacher_model_kind", None) == "base":
        raise UnsupportedModel(
            f"trainer is a {name} with teacher_model_kind='base': its teacher is the trained model {way}, so a cut "
            "would make it another model. Accepted is teacher_model_kind='live', or training without adapters"
        )
    if _uses_reference(trainer):
        raise UnsupportedModel(
            f"trainer is a {name} whose reference is the trained model {way}: a cut would make the reference another "
            f"model, and the loss would compare with that one. {_ways_out(trainer)}"
        )


def _uses_reference(trainer: Trainer) -> bool:
    """Return whether a Trainer computes a reference from the trained model during training."""
    if getattr(trainer, "ref_model", trainer) is not None:  # none is known, or it is a model of its own
        return False
    if any(getattr(trainer, flag, False) is True for flag in ("precompute_ref_logps", "precompute_ref_log_probs")):
        return False
    if getattr(trainer, "reference_free", False) is True or not _beta(trainer):
        return False
    settings = getattr(trainer, "finetuning_args", None)  # LLaMA-Factory's: its ORPO and SimPO need no reference
    return not (getattr(settings, "stage", None) == "dpo" and getattr(settings, "use_ref_model", True) is False)


def _beta(trainer: Trainer) -> Any:
    """The weight of the reference in the loss. A Trainer without one has no reference."""
    beta = getattr(trainer.args, "beta", None)
    return getattr(trainer, "beta", None) if beta is None else beta


def _ways_out(trainer: Trainer) -> str:
    ways = []
    if hasattr(trainer.args, "precompute_ref_log_probs"):
        ways.append("precompute_ref_log_probs=True")
    if hasattr(trainer.args, "num_generations"):
        ways.append("beta=0.0, which needs no reference")
    else:
        ways.append("a ref_model of its own, which stays dense")
    return f"Accepted are {', '.join([*ways, 'and training without adapters'])}"


def _check_callbacks(trainer: Trainer, name: str) -> None:
    for callback in trainer.callback_handler.callbacks:
        for kind in type(callback).__mro__:
            if kind.__name__ in COPYING_CALLBACKS:
                reason = COPYING_CALLBACKS[kind.__name__]
                raise UnsupportedModel(
                    f"trainer is a {name} with the callback {type(callback).__name__}: {reason}, and the smaller model "
                    "has other weights in the same places. Leave it out (in TRL: sync_ref_model=False)"
                )
            if kind.__name__ in LAYERWISE_CALLBACKS:
                raise UnsupportedModel(
                    f"trainer is a {name} with the callback {type(callback).__name__}, which trains some layers at a "
                    "time: their gradients cannot be compared. Train all layers during the probe"
                )


def _check_parallelism(trainer: Trainer) -> None:
    """Refuse sequences and matrices that are split over processes."""
    config = getattr(trainer.accelerator, "parallelism_config", None)
    for flag, what in (("cp_enabled", "context"), ("sp_enabled", "sequence"), ("tp_enabled", "tensor")):
        if getattr(config, flag, False):
            raise UnsupportedModel(
                f"trainer uses {what} parallelism, where no process has whole sequences and matrices: accepted are "
                "DistributedDataParallel and FSDP2"
            )
