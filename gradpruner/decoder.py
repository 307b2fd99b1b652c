"""Where a model's decoder layers are, and what is in them. By structure, never by a model's name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradpruner.errors import InvalidArgument, ModelMismatch, UnsupportedModel

ROUTERS = ("gate", "router", "shared_expert_gate")  # a router's weight is never merged (C)
SAMPLES = 16  # entries of each weight that go into the fingerprint


@dataclass(frozen=True)
class Weight:
    """One linear weight of a decoder layer.

    name: its path in the layer with adapters stripped ("self_attn.q_proj.weight"); shape: as it is stored;
    transposed: stored (in, out), as GPT-2 does.
    """

    layer: int
    name: str
    shape: tuple[int, ...]
    transposed: bool = False


class Decoder:
    """The `ModuleList` of decoder layers of a model, found by structure.

    model: a transformers model, plain, PEFT-wrapped, compiled or in DistributedDataParallel. layers: path of the
    ModuleList (or the list itself) for a model that is not Hugging Face's, or has several of them.
    Raises UnsupportedModel if there is no list of decoder layers, InvalidArgument if `layers` is wrong.
    """

    def __init__(self, model: nn.Module, layers: str | nn.ModuleList | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise InvalidArgument(f"model is a {type(model).__name__}; expected a torch.nn.Module")
        self.given = model
        self.base = unwrap(model)
        self.path = _find(self.base, layers)
        weights = [weight for index in range(len(self.layers)) for weight in linear_weights(self, index)]
        self.weights = weights

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers as they are now."""
        found = self.base.get_submodule(self.path)
        assert isinstance(found, nn.ModuleList)
        return found

    @property
    def config(self) -> Any:
        """The transformers configuration, None for a model without one."""
        return getattr(self.base, "config", None)

    def parameter(self, weight: Weight) -> nn.Parameter:
        """The stored parameter of a linear weight, resolved now: wrappers swap parameters."""
        for name, parameter in base_parameters(self.layers[weight.layer]):
            if name == weight.name:
                return parameter
        raise ModelMismatch(f"layer {weight.layer} has no weight {weight.name!r} any more")

    def structure(self, layer: int) -> str:
        """A digest of names and shapes: layers with equal digests can be merged."""
        parts = [f"{name}{tuple(_full_shape(p))}" for name, p in base_parameters(self.layers[layer])]
        return hashlib.sha256("|".join(sorted(parts)).encode()).hexdigest()[:16]

    def parameters_of(self, layer: int) -> int:
        """Number of parameters of a layer, adapters not counted."""
        return sum(_full_shape(p).numel() for _, p in base_parameters(self.layers[layer]))

    def total_parameters(self) -> int:
        """Number of parameters of the model, tied ones once, adapters not counted."""
        return sum({id(p): _full_shape(p).numel() for _, p in base_parameters(self.base)}.values())

    def fingerprint(self, *, content: bool | None = None, samples: Callable[[Weight], Tensor] | None = None) -> str:
        """Tells this model from others: its structure, and a sample of its weights.

        content: whether to sample the weights; by default only where they are frozen, since weights that train
        change while the probe watches. Sampled values are rounded to bfloat16: the same checkpoint loaded in
        float32 or bfloat16 has the same fingerprint. samples: where the model is on the meta device, what gives
        the values at `sample_positions` of a weight, as loading would store them.
        """
        parameters = [self.parameter(weight) for weight in self.weights]
        shape = hashlib.sha256(self.path.encode())
        for layer in range(len(self.layers)):
            shape.update(self.structure(layer).encode())
        if content is None:
            content = all(not p.requires_grad for p in parameters)
        known = samples is not None or not any(p.is_meta for p in parameters)
        if not content or not known or not all(p.is_floating_point() for p in parameters):
            return shape.hexdigest()[:16]
        sample = hashlib.sha256()
        for weight, parameter in zip(self.weights, parameters, strict=True):
            values = samples(weight) if samples is not None else _sampled(parameter)
            sample.update(values.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
        return f"{shape.hexdigest()[:16]}-{sample.hexdigest()[:16]}"

    def check_fingerprint(self, expected: str, what: str, samples: Callable[[Weight], Tensor] | None = None) -> None:
        """Raises ModelMismatch unless `expected` (of a plan or an igia, called `what`) was made from this model."""
        structure, _, content = expected.partition("-")
        own_structure, _, own_content = self.fingerprint(content=bool(content), samples=samples).partition("-")
        if structure != own_structure:
            raise ModelMismatch(f"{what} was made from a model of another shape than this one")
        if content and own_content and content != own_content:
            raise ModelMismatch(f"{what} was made from a model with other weights (or loaded in another precision)")


def sample_positions(entries: int) -> range:
    """Flat indices of the entries of a weight that go into the fingerprint."""
    return range(0, entries, max(1, entries // SAMPLES))[:SAMPLES]


def _sampled(parameter: nn.Parameter) -> Tensor:
    positions = sample_positions(parameter.numel())
    return parameter.detach().flatten()[:: positions.step][: len(positions)]


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers (or plain) model inside torch.compile, DistributedDataParallel and PEFT wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, DistributedDataParallel):
            model = model.module
        elif is_peft(model):
            model = model.get_base_model()  # type: ignore[operator]
        else:
            return model


def is_peft(model: nn.Module) -> bool:
    """Whether this is a `peft.PeftModel`, told without importing peft."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def peft_of(model: nn.Module) -> nn.Module | None:
    """The PeftModel in a stack of wrappers, if there is one."""
    while not is_peft(model):
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, DistributedDataParallel):
            model = model.module
        else:
            return None
    return model


def base_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Named parameters as the model without adapters names them: adapters left out, their wrappers stripped."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        plain = base_name(name)
        if plain is not None:
            yield plain, parameter


def base_name(name: str) -> str | None:
    """The name a parameter has without adapters, or None if it belongs to an adapter."""
    parts = name.split(".")
    if any(part.startswith("lora_") for part in parts) or "modules_to_save" in parts:
        return None
    return ".".join(part for part in parts if part not in ("base_layer", "original_module"))


def linear_weights(decoder: Decoder, index: int) -> Iterator[Weight]:
    """The weights of a layer that are scored and merged: of linears and experts; no norm, bias, router (C)."""
    layer = decoder.layers[index]
    for name, parameter in base_parameters(layer):
        path, _, leaf = name.rpartition(".")
        owner = _owner(layer, path)
        if path.rpartition(".")[2] in ROUTERS or path.endswith("router"):
            continue
        shape = tuple(_full_shape(parameter, owner))
        if leaf == "weight" and len(shape) == 2 and is_linear(owner):
            yield Weight(index, name, shape, transposed=is_transposed(owner))
        elif len(shape) == 3 and not isinstance(owner, nn.modules.conv._ConvNd):
            yield Weight(index, name, shape)


def is_linear(module: nn.Module) -> bool:
    """`nn.Linear` (quantised ones derive from it) or transformers' transposed `Conv1D`."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear stores its weight (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def linear_modules(decoder: Decoder, index: int) -> dict[str, nn.Module]:
    """Weight name to the linear that owns it, adapters looked through."""
    layer = decoder.layers[index]
    wanted = {weight.name for weight in decoder.weights if weight.layer == index and len(weight.shape) == 2}
    return {name: _owner(layer, name.rpartition(".")[0]) for name in wanted}


def _owner(layer: nn.Module, path: str) -> nn.Module:
    module: Any = layer
    for part in path.split(".") if path else []:
        if not hasattr(module, part):
            module = getattr(module, "base_layer", None) or getattr(module, "original_module", module)
        module = getattr(module, part)
    return getattr(module, "base_layer", module)


def _full_shape(parameter: Tensor, owner: Any = None) -> torch.Size:
    if owner is not None and not parameter.is_floating_point() and hasattr(owner, "in_features"):
        return torch.Size((int(owner.out_features), int(owner.in_features)))  # packed by a quantiser
    return parameter.shape


def _find(base: nn.Module, layers: str | nn.ModuleList | None) -> str:
    lists = {name: module for name, module in base.named_modules() if isinstance(module, nn.ModuleList) and len(module)}
    if isinstance(layers, nn.ModuleList):
        for name, module in lists.items():
            if module is layers:
                return name
        raise InvalidArgument("layers is a ModuleList that is not part of the model")
    if layers is not None:
        if layers not in lists:
            raise InvalidArgument(f"layers = {layers!r} is no ModuleList of this model; accepted are {sorted(lists)}")
        return layers
    count = _configured_layers(base)
    if count is None:
        raise UnsupportedModel(
            f"{type(base).__name__} has no config with num_hidden_layers: name its ModuleList of decoder layers "
            f"with layers=...; it has {sorted(lists)}"
        )
    fitting = [name for name, module in lists.items() if len(module) == count and _holds_linears(module)]
    outer = [n for n in fitting if not any(n.startswith(f"{other}.") for other in fitting if other != n)]
    if len(outer) > 1 and hasattr(base, "get_decoder"):
        inside = {id(module) for module in base.get_decoder().modules()}  # type: ignore[operator]
        outer = [name for name in outer if id(lists[name]) in inside]
    if len(outer) != 1:
        found = f"several lists of {count} layers, {outer}" if outer else f"no list of {count} decoder layers"
        raise UnsupportedModel(f"{type(base).__name__} has {found}: name it with layers=...; lists: {sorted(lists)}")
    return outer[0]


def _configured_layers(base: nn.Module) -> int | None:
    config: Any = getattr(base, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    count = getattr(config, "num_hidden_layers", None)
    return count if isinstance(count, int) else None


def _holds_linears(layers: nn.ModuleList) -> bool:
    return all(any(is_linear(module) for module in layer.modules()) for layer in layers)
