"""LoRA adapters of a model that is cut while it trains: kept or fresh in place, and a config that says where they are.

The adapters' modules and parameters stay the same objects, so every wrapper and optimizer that knows them still does.
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


def check_are_lora(peft: Any) -> None:
    """Raises UnsupportedModel unless every trained adapter is a LoRA: others may number the layers for themselves."""
    for name, config in peft.peft_config.items():
        added = [(n.split("."), p) for n, p in peft.named_parameters() if base_name(n) is None]
        if not any(name in parts and p.requires_grad for parts, p in added):
            continue
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind != "LORA":
            raise UnsupportedModel(f"adapter {name!r} is of type {kind}; only LoRA (and DoRA) can be cut in place")


def check_can_be_fresh(peft: Any) -> None:
    """Raises UnsupportedModel unless every trained adapter is a LoRA that can start again in place."""
    check_are_lora(peft)
    for name, config in peft.peft_config.items():
        if not any(p.requires_grad for _, p in _parameters(peft, name)):
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
    """Give every trained adapter the values a new one would have, and return its parameters.

    The same for a seed on every device, sharded or not, whatever ran before. Adapters that do not train are left
    alone, as are whole modules that train (modules_to_save).
    """
    generator, renewed = torch.Generator().manual_seed(seed), list[nn.Parameter]()
    for module in peft.modules():
        if not hasattr(module, "lora_A"):
            continue
        for adapter, config in peft.peft_config.items():
            parameters = [p for _, p in _parameters(module, adapter)]
            if any(p.requires_grad for p in parameters):
                _renew(module, adapter, config, generator)
                renewed += parameters
    for parameter in renewed:
        parameter.grad = None
    return renewed


def _renew(module: Any, adapter: str, config: Any, generator: torch.Generator) -> None:
    # as peft's reset_lora_parameters, but by a generator of its own and for sharded parameters too
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


def _norms(module: Any, adapter: str) -> Tensor:
    """What a DoRA divides by: norms of the base weight with the adapter, in the shape of its magnitudes."""
    dora = module.lora_magnitude_vector[adapter]
    known = dora.weight
    if adapter in module.lora_A:
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    else:
        a, b = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
    dora.update_layer(base_layer=module.get_base_layer(), lora_A=a, lora_B=b, scaling=module.scaling[adapter])
    norms, dora.weight = dora.weight, known
    dora.train(dora.training)  # forgets cached norms
    return norms.detach()


@contextlib.contextmanager
def keeping_scales(peft: Any, undo: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """What is added to base weights inside counts as it is: DoRAs scale each row of them by the same factor as before.

    Their magnitudes follow the norms, which would else take back a part of what was added. undo: gets each magnitude
    that changes, with its values before.
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


def assign(parameter: Any, values: Tensor) -> None:
    """Copy whole values into a parameter, of a sharded one into this process's shard."""
    if hasattr(parameter, "device_mesh"):  # every rank has the same values and keeps its shard
        from torch.distributed.tensor import distribute_tensor

        values = values.to(parameter.device, parameter.dtype)
        parameter.copy_(distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None))
    else:
        parameter.copy_(values)


def _parameters(module: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in module.named_parameters():
        parts = name.split(".")
        if adapter in parts and any(part.startswith("lora_") for part in parts):
            yield name, parameter


def describe(peft: Any, base: str) -> None:
    """Make every adapter's config say where its layers are now, so that its checkpoint loads onto `base`.

    Patterns that name layers by number are replaced by the full names of the modules that hold the adapter.
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
    """The model inside adapters as a model of its own that shares its tensors: what `save` can write."""
    with torch.device("meta"):
        plain = type(base)(copy.deepcopy(base.config))
    for find in ("named_parameters", "named_buffers"):
        for raw, tensor in getattr(base, find)(remove_duplicate=False):
            name = base_name(raw)
            if name is not None:
                path, _, leaf = name.rpartition(".")
                owner = plain.get_submodule(path)
                (owner._parameters if find == "named_parameters" else owner._buffers)[leaf] = tensor
    left = [name for name, tensor in (*plain.named_parameters(), *plain.named_buffers()) if tensor.is_meta]
    if left:
        raise UnsupportedModel(f"{type(base).__name__} has no {left[0]!r} without its adapters")
    if hasattr(base, "generation_config"):  # a classifier has none
        plain.generation_config = base.generation_config
    return plain.train(base.training)


@contextlib.contextmanager
def _casting_inputs(base: nn.Module) -> Iterator[None]:
    """Adapters take inputs of another dtype inside, as they do unless peft was told to leave that to autocast."""
    off = [m for m in base.modules() if getattr(m, "cast_input_dtype_enabled", None) is False]
    for module in off:
        module.cast_input_dtype_enabled = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in off:
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]


@contextlib.contextmanager
def _adapters_off(base: nn.Module) -> Iterator[None]:
    """peft's own `disable_adapter` fails where no layer with an adapter is left, and unfreezes what was frozen."""
    wrappers: list[Any] = [m for m in base.modules() if hasattr(m, "enable_adapters") and not m.disable_adapters]
    with keeping_grad_flags(base):
        try:
            for wrapper in wrappers:
                wrapper.enable_adapters(False)
            yield
        finally:
            for wrapper in wrappers:
                wrapper.enable_adapters(True)
