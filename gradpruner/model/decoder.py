"""The decoder layers of a model, and the weights in them."""

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
from gradpruner.errors import InvalidArgument, ModelMismatch
from gradpruner.model.layer_list import find_layers
from gradpruner.model.linears import is_linear, is_transposed
from gradpruner.model.wrappers import altered_base, unwrap

ROUTERS = ("gate", "router", "shared_expert_gate")  # weights of routers are not merged (docs/method.md, section 3)
# Beginnings of the names of parameters and modules that PEFT's adapters add to a layer.
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
WRAPPERS = ("base_layer", "original_module", "token_adapter", CHECKPOINTED)  # attributes that hold a wrapped module
SAMPLES = 16  # entries of each weight that go into the fingerprint


@dataclass(frozen=True)
class Weight:
    """One linear weight of a decoder layer.

    Args:
        layer: the index of the layer.
        name: the path in the layer, without adapters, e.g. "self_attn.q_proj.weight".
        shape: the shape as it is stored, before a quantiser packs it.
        transposed: whether it is stored as (in, out), as in GPT-2.
    """

    layer: int
    name: str
    shape: tuple[int, ...]
    transposed: bool = False


class Decoder:
    """The decoder layers of a model, their weights, and the fingerprint of the model.

    Args:
        model: a transformers model. It may be wrapped by PEFT, torch.compile, DistributedDataParallel or DeepSpeed.
        layers: the path of the ModuleList of decoder layers, or the list itself. It is needed for a model that is
            not Hugging Face's, or that has several such lists.

    Attributes:
        given: the model as it was given.
        base: the model without wrappers.
        path: where the list of layers is in `base`, e.g. "model.layers".
        shared: ids of parameters that several layers share.
        weights: the linear weights of all layers, as `linear_weights` gives them.

    Raises:
        UnsupportedModel: there is no list of decoder layers.
        InvalidArgument: `model` or `layers` is wrong.
    """

    def __init__(self, model: nn.Module, layers: str | nn.ModuleList | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise InvalidArgument(f"model is a {type(model).__name__}; expected a torch.nn.Module")
        self.given = model
        self.base = unwrap(model)
        self.path = find_layers(self.base, layers)
        owners = Counter(id(p) for layer in self.layers for p in {id(p): p for p in layer.parameters()}.values())
        self.shared = {parameter for parameter, count in owners.items() if count > 1}
        self.weights = [weight for index in range(len(self.layers)) for weight in linear_weights(self, index)]

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers as they are now."""
        layers = self.base.get_submodule(self.path)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @property
    def body(self) -> nn.Module:
        """The model without its head, or all of it where the layers are not in that part."""
        inner = getattr(self.base, "base_model", self.base)
        return inner if any(module is self.layers for module in inner.modules()) else self.base

    @property
    def config(self) -> Any:
        """The transformers configuration, or None for a model without one."""
        return getattr(self.base, "config", None)

    def parameter(self, weight: Weight) -> nn.Parameter:
        """The parameter that holds a linear weight now.

        Wrappers exchange parameters, so the answer should not be kept.
        """
        for name, parameter in base_parameters(self.layers[weight.layer]):
            if name == weight.name:
                return parameter
        raise ModelMismatch(f"layer {weight.layer} has no weight {weight.name!r} any more")

    def path_of(self, weight: Weight) -> str:
        """The name of a weight in the base model: "model.layers.3.self_attn.q_proj.weight"."""
        return f"{self.path}.{weight.layer}.{weight.name}"

    def structure(self, layer: int) -> str:
        """A digest of names and shapes. Layers with equal digests can be merged."""
        parts = [f"{name}{tuple(shape)}" for name, _, shape in base_shapes(self.layers[layer])]
        return hashlib.sha256("|".join(sorted(parts)).encode()).hexdigest()[:16]

    def total_parameters(self) -> int:
        """The number of parameters of the model: tied ones count once, adapters do not count."""
        return sum({id(p): shape.numel() for _, p, shape in base_shapes(self.base)}.values())

    def fingerprint(self, *, content: bool | None = None, samples: Callable[[Weight], Tensor] | None = None) -> str:
        """Return a text that identifies this model.

        It holds a digest of the structure and one of a sample of the weights. Sampled values are rounded to bfloat16,
        so that a checkpoint has the same fingerprint whether it is loaded in float32 or in bfloat16.

        Args:
            content: whether to sample the weights. The default samples them where they are frozen and no adapter has
                changed them, since weights that train change while the probe watches.
            samples: for a model on the meta device, a function that returns the values of a weight at its
                `sample_positions`, as loading would store them.

        Returns:
            16 hexadecimal digits for the structure. Where weights were sampled, a hyphen and 16 more.
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
        """Raise ModelMismatch unless a plan or an igia was made from this model.

        Args:
            expected: the fingerprint that it carries.
            what: what the error calls it, e.g. "the plan".
            samples: as in `fingerprint`.
        """
        structure, _, content = expected.partition("-")
        own_structure, _, own_content = self.fingerprint(content=bool(content), samples=samples).partition("-")
        if structure != own_structure:
            raise ModelMismatch(f"{what} was made from a model of another shape than this one")
        if content and own_content and content != own_content:
            raise ModelMismatch(f"{what} was made from a model with other weights (or loaded in another precision)")


def sample_positions(entries: int) -> range:
    """Flat indices of those entries of a weight that go into the fingerprint."""
    return range(0, entries, max(1, entries // SAMPLES))[:SAMPLES]


def _sampled(parameter: nn.Parameter) -> Tensor:
    """The values at `sample_positions`. For a sharded parameter this is a collective."""
    positions = sample_positions(_full_shape(parameter).numel())
    rows = rows_of(parameter)
    if rows is None:
        with unpartitioned(parameter) as whole:
            return local(whole.detach()).flatten()[:: positions.step][: len(positions)].clone()
    width = parameter.numel() // parameter.shape[0]
    start, end = rows[0] * width, sum(rows) * width
    here = [i for i, position in enumerate(positions) if start <= position < end]
    own = local(parameter.detach()).flatten()[[positions[i] - start for i in here]]
    # Each entry is on one process only, so a sum gathers them. Bits are summed, since a sum of values would lose the
    # sign of a zero.
    bits = torch.zeros(len(positions), dtype=torch.int32)
    bits[here] = own.to("cpu", torch.bfloat16).view(torch.int16).int()
    return summed(bits, shard_group(parameter)).to(torch.int16).view(torch.bfloat16)


def is_packed(parameter: Tensor) -> bool:
    """Whether a quantiser stores the values in a form of its own."""
    # bitsandbytes may keep that form in a float tensor, which has a quant_state then
    return not parameter.is_floating_point() or hasattr(parameter, "quant_state")


def base_shapes(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, torch.Size]]:
    """`base_parameters`, each with the shape that it has before a quantiser packs it."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        plain = base_name(name)
        if plain is not None:
            yield plain, parameter, _full_shape(parameter, module.get_submodule(name.rpartition(".")[0]))


def base_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the model without adapters, with the names that they have there."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        plain = base_name(name)
        if plain is not None:
            yield plain, parameter


def base_name(name: str) -> str | None:
    """The name that a parameter has without adapters, or None if it belongs to an adapter."""
    parts = name.split(".")
    if any(part.startswith(ADAPTERS) for part in parts) or "modules_to_save" in parts:
        return None
    return ".".join(part for part in parts if part not in WRAPPERS)


def linear_weights(decoder: Decoder, index: int) -> Iterator[Weight]:
    """The weights of a layer that are scored and merged: those of linears and experts.

    Norms, biases and routers are left out. So is a weight that several layers share, as in Zamba: it belongs to no
    single layer, and a merge would add it to itself.

    Args:
        decoder: the model.
        index: the layer.

    Source: docs/method.md, section 3.
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


def linear_modules(decoder: Decoder, index: int) -> dict[str, nn.Module]:
    """The linears of a layer, without the adapters around them, by the names of their weights.

    Args:
        decoder: the model.
        index: the layer.
    """
    layer = decoder.layers[index]
    names = {weight.name for weight in decoder.weights if weight.layer == index and len(weight.shape) == 2}
    return {name: _owner(layer, name.rpartition(".")[0]) for name in names}


def _owner(layer: nn.Module, path: str) -> nn.Module:
    """The module at a path without adapters, inside the adapters that are around it."""
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
    """The shape of a parameter before a quantiser packs it, or ZeRO-3 takes it apart."""
    if owner is not None and is_packed(parameter) and hasattr(owner, "in_features"):
        return torch.Size((int(owner.out_features), int(owner.in_features)))
    return getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty tensor
