"""Wrappers around a transformers model: DeepSpeed, torch.compile, DDP, FSDP2, PEFT."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradpruner.distributed.deepspeed import is_engine
from gradpruner.distributed.fsdp import is_fsdp

# Start values of adapters (`init_lora_weights`) that leave the base weights as they were. Others move a part of the
# base weights into the adapter.
KEEPING_INITS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")


def wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield a model and what it wraps, from the outside in. The base model is last."""
    while True:
        yield model
        if is_engine(model):  # asked first, since it shows its module's attributes as its own
            model = model.module  # type: ignore[assignment]
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, DistributedDataParallel):
            model = model.module
        elif is_peft(model):
            model = model.get_base_model()  # type: ignore[operator]
        else:
            return


def unwrap(model: nn.Module) -> nn.Module:
    """Return the transformers (or plain) model inside all wrappers."""
    *_, base = wrappers(model)
    return base


def is_peft(model: nn.Module) -> bool:
    """Whether a model is a `peft.PeftModel`. PEFT is not imported to find out."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def peft_of(model: nn.Module) -> nn.Module | None:
    """Return the PeftModel in a stack of wrappers, or None."""
    return next((wrapper for wrapper in wrappers(model) if is_peft(wrapper) and not is_engine(wrapper)), None)


def altered_base(model: nn.Module) -> str | None:
    """Say why the weights under a model's adapters are not those of its checkpoint.

    The answer is None if they are. Some adapters take a part of the base weights into themselves, and leave the rest
    in the base model.
    """
    peft = peft_of(model)
    for name, config in getattr(peft, "peft_config", {}).items():
        init = getattr(config, "init_lora_weights", True)
        if str(init).lower() not in KEEPING_INITS:
            return f"adapter {name!r} (init_lora_weights={init!r}) took a part of the base weights into itself"
        if getattr(config, "bias", "none") not in ("none", False, None):
            return f"adapter {name!r} (bias={config.bias!r}) trains biases of the base model itself"
        if getattr(config, "kasa_config", None):
            return f"adapter {name!r} (kasa_config) cut the smallest singular values off the base weights"
    if any(getattr(module, "merged_adapters", None) for module in unwrap(model).modules()):
        return "adapters are merged into the base weights (unmerge_adapter() takes them out again, up to rounding)"
    return None


def root_of(model: nn.Module) -> nn.Module | None:
    """Return the outermost wrapper that FSDP2 shards, or None. Forwards must begin there."""
    return next((wrapper for wrapper in wrappers(model) if is_fsdp(wrapper)), None)
