"""LoRA adapters of a model that is cut in place: keep them, or start them anew.

The modules and parameters of the adapters stay the same objects, so every wrapper and optimizer that knows them still
does.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gradpruner.errors import UnsupportedModel
from gradpruner.model.decoder import CHECKPOINTED, base_name
from gradpruner.model.modes import keeping_grad_flags

FRESH_INITS = (True, "gaussian")  # of LoraConfig.init_lora_weights: those that leave the base weights alone


def check_adapters(peft: Any, mode: str) -> None:
    """Check that a cut in place can treat the trained adapters of a model as asked.

    Args:
        peft: the PeftModel.
        mode: "keep" what the adapters learned, or "discard" it and start them anew.

    Raises:
        UnsupportedModel: a trained adapter is not a LoRA, or is to start anew and cannot.
    """
    _check_are_lora(peft)
    if mode == "discard":
        _check_can_be_fresh(peft)


def _check_are_lora(peft: Any) -> None:
    """Refuse trained adapters of other types: they may number the layers themselves."""
    for name, config in peft.peft_config.items():
        parts = [(n.split("."), p) for n, p in peft.named_parameters() if base_name(n) is None]
        if not any(name in path and p.requires_grad for path, p in parts):
            continue
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind != "LORA":
            raise UnsupportedModel(f"adapter {name!r} is of type {kind}; only LoRA (and DoRA) can be cut in place")


def _check_can_be_fresh(peft: Any) -> None:
    """Refuse LoRAs whose start changed the base weights, or is unknown."""
    for name, config in peft.peft_config.items():
        if not any(p.requires_grad for p in _parameters_of(peft, name)):
            continue
        if config.init_lora_weights not in FRESH_INITS:
            raise UnsupportedModel(
                f"adapter {name!r} has init_lora_weights={config.init_lora_weights!r}; a cut that discards starts "
                f"adapters anew, accepted are {' and '.join(map(repr, FRESH_INITS))}"
            )
        variants = {
            type(module.lora_variant[name]).__name__
            for module in peft.modules()
            if name in getattr(module, "lora_variant", ())
        }
        unknown = sorted(variant for variant in variants if not variant.startswith("Dora"))
        if unknown:
            raise UnsupportedModel(f"adapter {name!r} is a {unknown[0]}; only LoRA and DoRA can be cut in place")


@torch.no_grad()
def make_fresh(peft: Any, seed: int) -> list[nn.Parameter]:
    """Start every trained adapter anew, in place.

    Adapters that do not train are left alone, and so are whole modules that train (`modules_to_save`).

    Args:
        peft: the PeftModel.
        seed: decides the new values. They are the same on every device, sharded or not, whatever ran before.

    Returns:
        The parameters that got new values.
    """
    generator, renewed = torch.Generator().manual_seed(seed), list[nn.Parameter]()
    for module in peft.modules():
        if not hasattr(module, "lora_A"):
            continue
        for adapter, config in peft.peft_config.items():
            parameters = list(_parameters_of(module, adapter))
            if any(p.requires_grad for p in parameters):
                _renew(module, adapter, config, generator)
                renewed += parameters
    for parameter in renewed:
        parameter.grad = None
    return renewed


def _renew(module: Any, adapter: str, config: Any, generator: torch.Generator) -> None:
    """Do what reset_lora_parameters does, with our generator, and for shards too."""
    if adapter in module.lora_A:
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter]
        values = torch.empty(a.shape)
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(values, std=1 / module.r[adapter], generator=generator)
        else:
            nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
        assign(a, values)
        for parameter in b.parameters():
            parameter.zero_()
    if adapter in module.lora_embedding_A:
        b = module.lora_embedding_B[adapter]
        module.lora_embedding_A[adapter].zero_()
        assign(b, torch.empty(b.shape).normal_(generator=generator))
    if adapter in getattr(module, "lora_magnitude_vector", ()):
        module.lora_magnitude_vector[adapter].weight.copy_(_norms(module, adapter))


def assign(parameter: Any, values: Tensor) -> None:
    """Copy whole values into a parameter; of a sharded one, each process fills its shard.

    Args:
        parameter: the parameter, changed in place.
        values: a tensor of the shape of the whole parameter, the same on every process.
    """
    if hasattr(parameter, "device_mesh"):  # every rank has the same values and keeps its shard
        from torch.distributed.tensor import distribute_tensor

        values = values.to(parameter.device, parameter.dtype)
        parameter.copy_(distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None))
    else:
        parameter.copy_(values)


def _parameters_of(module: nn.Module, adapter: str) -> Iterator[nn.Parameter]:
    """The LoRA parameters of one adapter."""
    for name, parameter in module.named_parameters():
        parts = name.split(".")
        if adapter in parts and any(part.startswith("lora_") for part in parts):
            yield parameter


def _norms(module: Any, adapter: str) -> Tensor:
    """What DoRA divides by: the norms of the base weight with the adapter."""
    dora = module.lora_magnitude_vector[adapter]
    magnitudes = dora.weight
    if adapter in module.lora_A:
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    else:
        a, b = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
    dora.update_layer(base_layer=module.get_base_layer(), lora_A=a, lora_B=b, scaling=module.scaling[adapter])
    norms, dora.weight = dora.weight, magnitudes
    dora.train(dora.training)  # forgets cached norms
    return norms.detach()


@contextlib.contextmanager
def keeping_scales(peft: Any, undo: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Keep the factors by which DoRA scales rows, while base weights change inside the block.

    The magnitudes follow the norms of the weights. Without this, they would take back a part of what was added.

    Args:
        peft: the PeftModel.
        undo: gets each changed magnitude and a copy of its values.
    """
    with torch.no_grad():
        before = {(module, adapter): _norms(module, adapter) for module, adapter in _doras(peft)}
    yield
    with torch.no_grad():
        for module, adapter in _doras(peft):
            magnitudes = module.lora_magnitude_vector[adapter].weight
            undo.append((magnitudes.data, magnitudes.data.clone()))
            magnitudes.copy_(magnitudes * (_norms(module, adapter) / before[module, adapter]))


def _doras(peft: Any) -> Iterator[tuple[Any, str]]:
    for module in peft.modules():
        for adapter in getattr(module, "lora_magnitude_vector", ()):
            yield module, adapter


def describe(peft: Any, base: str) -> None:
    """Rewrite the adapters' configs so that their checkpoint loads onto the cut model.

    Patterns that name layers by number are replaced by the full names of the modules that hold the adapter.

    Args:
        peft: the PeftModel, cut.
        base: where the cut base model is saved: the folder or hub id that the configs will name.
    """
    modules = peft.get_base_model().named_modules()
    names = {name.replace(f"{CHECKPOINTED}.", ""): module for name, module in modules if hasattr(module, "lora_A")}
    for adapter, config in peft.peft_config.items():
        config.base_model_name_or_path, config.revision = base, None
        if not _names_layers(config):
            continue
        holding = {n: m for n, m in names.items() if adapter in m.lora_A or adapter in m.lora_embedding_A}
        config.target_modules = set(holding)
        config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
        config.rank_pattern = {n: m.r[adapter] for n, m in holding.items() if m.r[adapter] != config.r}
        config.alpha_pattern = {
            n: m.lora_alpha[adapter] for n, m in holding.items() if m.lora_alpha[adapter] != config.lora_alpha
        }


def _names_layers(config: Any) -> bool:
    """Whether a LoraConfig may name layers by number."""
    targets = config.target_modules
    return bool(
        config.layers_to_transform is not None
        or config.rank_pattern
        or config.alpha_pattern
        or config.exclude_modules
        or isinstance(targets, str)
        or any(part.isdigit() for target in targets or () for part in target.split("."))
    )


def without_adapters(base: Any) -> Any:
    """Make a plain model that shares the tensors of a model inside adapters, for `save`.

    Raises UnsupportedModel where a tensor of the plain model is missing.
    """
    with torch.device("meta"):
        plain = type(base)(copy.deepcopy(base.config))
    for find in ("named_parameters", "named_buffers"):
        for raw, tensor in getattr(base, find)(remove_duplicate=False):
            name = base_name(raw)
            if name is not None:
                path, _, leaf = name.rpartition(".")
                owner = plain.get_submodule(path)
                (owner._parameters if find == "named_parameters" else owner._buffers)[leaf] = tensor
    missing = [name for name, tensor in (*plain.named_parameters(), *plain.named_buffers()) if tensor.is_meta]
    if missing:
        raise UnsupportedModel(f"{type(base).__name__} has no {missing[0]!r} without its adapters")
    if hasattr(base, "generation_config"):  # a classifier has none
        plain.generation_config = base.generation_config
    return plain.train(base.training)


@contextlib.contextmanager
def casting_inputs(base: nn.Module) -> Iterator[None]:
    """Let adapters convert inputs of another dtype, where peft leaves that to autocast."""
    strict = [m for m in base.modules() if getattr(m, "cast_input_dtype_enabled", None) is False]
    for module in strict:
        module.cast_input_dtype_enabled = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in strict:
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]


@contextlib.contextmanager
def adapters_off(base: nn.Module) -> Iterator[None]:
    """Switch the adapters off inside the block.

    peft's own `disable_adapter` fails where no layer with an adapter is left, and unfreezes what was frozen.
    """
    wrappers: list[Any] = [m for m in base.modules() if hasattr(m, "enable_adapters") and not m.disable_adapters]
    with keeping_grad_flags(base):
        try:
            for wrapper in wrappers:
                wrapper.enable_adapters(False)
            yield
        finally:
            for wrapper in wrappers:
                wrapper.enable_adapters(True)
