"""Where a model's decoder layers are, and what is in them. By structure, never by a model's name."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradpruner.distributed.deepspeed import unpartitioned
from gradpruner.distributed.processes import summed
from gradpruner.distributed.sharding import local, rows_of, shard_group
from gradpruner.errors import InvalidArgument, ModelMismatch, UnsupportedModel
from gradpruner.model.config import _nearest_config, layer_counts, text_config
from gradpruner.model.wrappers import altered_base, unwrap

ROUTERS = ("gate", "router", "shared_expert_gate")  # a router's weight is never merged (C)
# What peft's adapters call the parameters and modules they add to a layer: its prefixes, and where it has none.
ADAPTERS = (
    "lora_",
    "adamss_",
    "adaption_",
    "beft_",
    "boft_",
    "c3a_",
    "deft_",
    "delora_",
    "fourierft_",
    "frod_",
    "glora_",
    "gralora_",
    "hada_",
    "hira_",
    "hra_",
    "ia3_",
    "lily_",
    "ln_tuning_",
    "lokr_",
    "miss_",
    "oft_",
    "osf_",
    "peanut_",
    "poly_",
    "psoft_",
    "pvera_",
    "randlora_",
    "ranknum",
    "road_",
    "shadow_",
    "shira_",
    "supertuning_",
    "tinylora_",
    "trainable_tokens_",
    "unilora_",
    "vblora_",
    "vera_",
    "waveft_",
    "xlora_",
)
CHECKPOINTED = "_checkpoint_wrapped_module"  # in torch's checkpoint_wrapper, which accelerate puts around layers
WRAPPERS = ("base_layer", "original_module", "token_adapter", CHECKPOINTED)  # parts of names that hold what was wrapped
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
        owners = Counter(id(p) for layer in self.layers for p in {id(p): p for p in layer.parameters()}.values())
        self.shared = {parameter for parameter, count in owners.items() if count > 1}
        weights = [weight for index in range(len(self.layers)) for weight in linear_weights(self, index)]
        self.weights = weights

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers as they are now."""
        found = self.base.get_submodule(self.path)
        assert isinstance(found, nn.ModuleList)
        return found

    @property
    def body(self) -> nn.Module:
        """The model without its head; all of it where the layers are not in that part."""
        inner = getattr(self.base, "base_model", self.base)
        return inner if any(module is self.layers for module in inner.modules()) else self.base

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

    def path_of(self, weight: Weight) -> str:
        """The name of a linear weight in the whole model, without adapters."""
        return f"{self.path}.{weight.layer}.{weight.name}"

    def structure(self, layer: int) -> str:
        """A digest of names and shapes: layers with equal digests can be merged."""
        parts = [f"{name}{tuple(shape)}" for name, _, shape in base_shapes(self.layers[layer])]
        return hashlib.sha256("|".join(sorted(parts)).encode()).hexdigest()[:16]

    def total_parameters(self) -> int:
        """Number of parameters of the model, tied ones once, adapters not counted."""
        return sum({id(p): shape.numel() for _, p, shape in base_shapes(self.base)}.values())

    def fingerprint(self, *, content: bool | None = None, samples: Callable[[Weight], Tensor] | None = None) -> str:
        """Tells this model from others: its structure, and a sample of its weights.

        content: whether to sample the weights; by default only where they are frozen, since weights that train
        change while the probe watches, and where no adapter has changed them. Sampled values are rounded to
        bfloat16: the same checkpoint loaded in float32 or bfloat16 has the same fingerprint. samples: where the
        model is on the meta device, what gives the values at `sample_positions` of a weight, as loading would
        store them.
        """
        parameters = [self.parameter(weight) for weight in self.weights]
        shape = hashlib.sha256(self.path.encode())
        for layer in range(len(self.layers)):
            shape.update(self.structure(layer).encode())
        if content is None:
            content = all(not p.requires_grad for p in parameters) and altered_base(self.given) is None
        known = samples is not None or not any(p.is_meta for p in parameters)
        if not content or not known or any(is_packed(p) for p in parameters):
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
    positions = sample_positions(_full_shape(parameter).numel())
    rows = rows_of(parameter)
    if rows is None:
        with unpartitioned(parameter) as whole:
            return local(whole.detach()).flatten()[:: positions.step][: len(positions)].clone()
    width = parameter.numel() // parameter.shape[0]
    start, end = rows[0] * width, sum(rows) * width
    here = [i for i, position in enumerate(positions) if start <= position < end]
    own = local(parameter.detach()).flatten()[[positions[i] - start for i in here]]
    # each entry is on one process only: a sum of bits, which unlike a sum of values keeps even a zero's sign
    bits = torch.zeros(len(positions), dtype=torch.int32)
    bits[here] = own.to("cpu", torch.bfloat16).view(torch.int16).int()
    return summed(bits, shard_group(parameter)).to(torch.int16).view(torch.bfloat16)


def is_packed(parameter: Tensor) -> bool:
    """Whether a quantiser stores the values in a form of its own; bitsandbytes may keep that in a float tensor."""
    return not parameter.is_floating_point() or hasattr(parameter, "quant_state")


def base_shapes(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, torch.Size]]:
    """`base_parameters` with the shape that each has before a quantiser packs it."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        plain = base_name(name)
        if plain is not None:
            yield plain, parameter, _full_shape(parameter, module.get_submodule(name.rpartition(".")[0]))


def base_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Named parameters as the model without adapters names them: adapters left out, their wrappers stripped."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        plain = base_name(name)
        if plain is not None:
            yield plain, parameter


def base_name(name: str) -> str | None:
    """The name a parameter has without adapters, or None if it belongs to an adapter."""
    parts = name.split(".")
    if any(part.startswith(ADAPTERS) for part in parts) or "modules_to_save" in parts:
        return None
    return ".".join(part for part in parts if part not in WRAPPERS)


def linear_weights(decoder: Decoder, index: int) -> Iterator[Weight]:
    """The weights of a layer that are scored and merged: of linears and experts; no norm, bias, router (C).

    Nor a weight that several layers share (Zamba): it is no layer's own, and adding it to itself would double it.
    """
    layer = decoder.layers[index]
    for name, parameter in base_parameters(layer):
        if id(parameter) in decoder.shared:
            continue
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
        while not hasattr(module, part):  # adapters may be nested
            wrapped = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
            if wrapped is None:
                break
            module = wrapped
        module = getattr(module, part)
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def _full_shape(parameter: Tensor, owner: Any = None) -> torch.Size:
    if owner is not None and is_packed(parameter) and hasattr(owner, "in_features"):
        return torch.Size((int(owner.out_features), int(owner.in_features)))  # packed by a quantiser
    return getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty tensor


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
    counts = [count for _, count in layer_counts(base.config)] if hasattr(base, "config") else []
    if not counts:
        raise UnsupportedModel(
            f"{type(base).__name__} has no config with num_hidden_layers: name its ModuleList of decoder layers "
            f"with layers=...; it has {sorted(lists)}"
        )
    fitting: list[str] = []
    for count in dict.fromkeys(counts):
        long = [name for name, module in lists.items() if len(module) == count and _holds_linears(module)]
        outer = [n for n in long if not any(n.startswith(f"{other}.") for other in long if other != n)]
        fitting = _of_the_decoder(base, outer)
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            break
    found = f"several lists of {count} layers, {fitting}" if fitting else f"no list of {counts[0]} decoder layers"
    raise UnsupportedModel(f"{type(base).__name__} has {found}: name it with layers=...; lists: {sorted(lists)}")


def _of_the_decoder(base: nn.Module, names: list[str]) -> list[str]:
    """Of several lists of layers, those of the text decoder: not a vision tower's, not an encoder's."""
    text = type(text_config(base.config))
    inside: set[int] = set()
    if len(names) > 1 and hasattr(base, "get_decoder"):
        inside = {id(module) for module in base.get_decoder().modules()}  # type: ignore[operator]
    for belongs in (
        lambda name: type(_nearest_config(base, name)) is text,
        lambda name: id(base.get_submodule(name)) in inside,
        lambda name: any("decoder" in part for part in name.split(".")),
    ):
        if len(names) > 1:
            names = [name for name in names if belongs(name)] or names
    return names


def _holds_linears(layers: nn.ModuleList) -> bool:
    return all(any(is_linear(module) for module in layer.modules()) for layer in layers)
