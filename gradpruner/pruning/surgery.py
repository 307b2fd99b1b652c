"""Removing decoder layers from a transformers model so that nothing else changes, or refusing to.

A layer's behaviour may depend on its index through its own `layer_idx`, through per-layer lists in the config, or
through rules on the index. So the configuration is cut first; then the dense and the cut model are built from
their configurations on the meta device and compared layer by layer, in class, names, shapes and every
plain attribute. What differs is an index to renumber, or a reason to refuse (docs/method.md, section 5).
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig

from gradpruner.errors import UnsupportedModel
from gradpruner.model.config import text_config
from gradpruner.model.decoder import CHECKPOINTED, Decoder
from gradpruner.model.empty_model import absent_counts, build_empty, shapes_of
from gradpruner.model.extra_layers import generation_changes, log_counts_set_to_zero, without_extra
from gradpruner.model.layer_config import cut_config, renumber_modules

INDEX_NAMES = ("layer_idx", "layer_id", "layer_index", "layer_number")
PER_INSTANCE = ("_tied_weights_keys", "_keys_to_ignore_on_load_unexpected")  # transformers' own; may name layers
PLAIN = (bool, int, float, str, type(None))
# a parameter, the smaller one that took its place, and what cuts another tensor of the same shape alike
Replaced = tuple[nn.Parameter, nn.Parameter, Callable[[torch.Tensor], torch.Tensor]]


@dataclass
class Surgery:
    """A checked removal, not yet done: `perform()` does it and returns the function that undoes it."""

    decoder: Decoder
    kept: tuple[int, ...]
    configs: list[tuple[Any, Any]] = field(default_factory=list)  # (old object, its replacement)
    attributes: list[tuple[Any, str, Any]] = field(default_factory=list)  # of modules, and of the generation config
    parts: list[tuple[str, int]] = field(
        default_factory=list
    )  # parameters outside the layers, axis with a part a layer
    replaced: list[Replaced] = field(default_factory=list)  # by `perform`
    gone: list[tuple[Any, str, int]] = field(default_factory=list)  # counts of layers that the model never had

    def perform(self) -> Callable[[], None]:
        """Cut the list of layers, renumber, swap the config; nothing in here can fail half way for good."""
        base, path = self.decoder.base, self.decoder.path
        parent_path, _, leaf = path.rpartition(".")
        parent, old_layers = base.get_submodule(parent_path), self.decoder.layers
        undo: list[tuple[Any, str, Any]] = []

        def assign(module: Any, name: str, value: Any) -> None:
            undo.append((module, name, getattr(module, name)))
            setattr(module, name, value)

        def restore() -> None:
            for module, name, value in reversed(undo):
                setattr(module, name, value)

        replacement = {id(old): new for old, new in self.configs}
        try:
            for module in list(base.modules()):
                for name, value in list(vars(module).items()):
                    if id(value) in replacement:
                        assign(module, name, replacement[id(value)])
            for module, name, value in self.attributes:
                assign(module, name, value)
            for name, axis in self.parts:
                owner_path, _, own = name.rpartition(".")
                owner = _live(base, owner_path)
                part = functools.partial(_kept_parts, layers=len(old_layers), kept=self.kept, axis=axis)
                whole = getattr(owner, own)
                assign(owner, own, nn.Parameter(part(whole), whole.requires_grad))
                self.replaced.append((whole, getattr(owner, own), part))
            assign(parent, leaf, nn.ModuleList([old_layers[i] for i in self.kept]))
            log_counts_set_to_zero(self.gone)
        except BaseException:
            restore()
            raise
        return restore


def _kept_parts(tensor: torch.Tensor, layers: int, kept: tuple[int, ...], axis: int) -> torch.Tensor:
    """A tensor with one equal part a layer along `axis`, layer after layer, without the removed layers'."""
    parts: torch.Tensor = tensor.detach().unflatten(axis, (layers, -1))
    return parts.index_select(axis, torch.tensor(kept, device=tensor.device)).flatten(axis, axis + 1)


def prepare(decoder: Decoder, kept: tuple[int, ...]) -> Surgery:
    """Check that the layers in `kept` can stand alone and each stay what it was. Changes nothing.

    Raises UnsupportedModel naming what would change.
    """
    surgery = Surgery(decoder, kept)
    _check_one_stream(decoder)
    if not hasattr(decoder.config, "get_text_config"):
        _renumber_by_name(surgery)
        return surgery
    old, new = decoder.config, cut_config(decoder.config, kept, len(decoder.layers))
    surgery.gone = absent_counts(type(decoder.base), old)
    if surgery.gone:
        new = without_extra(new)
    if getattr(new, "quantization_config", None) is not None:
        renumber_modules(new.quantization_config, decoder.path, kept)
    generation = getattr(decoder.base, "generation_config", None)
    if generation is not None:
        changes = generation_changes(vars(generation), kept, extra_gone=bool(surgery.gone))
        surgery.attributes += [(generation, name, value) for name, value in changes.items()]
    surgery.configs = [(old, new)]
    if text_config(old) is not old:
        surgery.configs.append((text_config(old), text_config(new)))
    dense = build_empty(type(decoder.base), old)
    small = build_empty(type(decoder.base), _as_reloaded(new))
    _check_described(decoder, dense)
    _compare(surgery, dense, small)
    _check_cache(old, new)
    return surgery


def _check_one_stream(decoder: Decoder) -> None:
    """Skipping a layer means passing its hidden states on, which needs exactly one stream of them (not Reformer)."""
    for layer in decoder.layers:
        names = list(inspect.signature(layer.forward).parameters)
        if "hidden_states" in names[1:]:
            raise UnsupportedModel(f"{type(layer).__name__} takes {names[0]} beside hidden_states: two streams")


def _as_reloaded(config: Any) -> Any:
    """What a reload will see is what JSON holds, and what the class accepts of it."""
    try:
        return type(config).from_dict(config.to_dict())
    except Exception as error:
        raise UnsupportedModel(f"the cut config of {type(config).__name__} is not accepted: {error}") from error


def _check_described(decoder: Decoder, dense: nn.Module) -> None:
    actual, described = shapes_of(decoder.base), shapes_of(dense)
    for name in sorted(actual.keys() | described.keys()):
        if name not in actual or name not in described:
            where = "has no" if name not in actual else "has an undescribed"
            raise UnsupportedModel(f"the model is not what its config describes: it {where} parameter {name!r}")
        if actual[name] is not None and actual[name] != described[name]:
            raise UnsupportedModel(
                f"the model is not what its config describes: {name} has shape {actual[name]}, not {described[name]}"
            )


def _compare(surgery: Surgery, dense: nn.Module, small: nn.Module) -> None:
    path, base = surgery.decoder.path, surgery.decoder.base
    before, after = dense.get_submodule(path), small.get_submodule(path)
    assert isinstance(before, nn.ModuleList) and isinstance(after, nn.ModuleList)
    if len(after) != len(surgery.kept):
        raise UnsupportedModel(f"a model rebuilt from the cut config has {len(after)} layers, not {len(surgery.kept)}")
    for new, old in enumerate(surgery.kept):
        _compare_modules(surgery, before[old], after[new], surgery.decoder.layers[old], f"layer {old}", new - old)
    _compare_shapes_outside(surgery, dense, small)
    for name, module in dense.named_modules():
        if name == path or name.startswith(f"{path}."):
            continue
        other, live = small.get_submodule(name), base.get_submodule(name)
        _swap_configs(surgery, module, other, live)
        was = _plain(module, PER_INSTANCE)
        for attribute, value in _plain(other, PER_INSTANCE).items():  # a count of layers, "has any sliding layer"
            if attribute in was and not _equal(was[attribute], value) and hasattr(live, attribute):
                surgery.attributes.append((live, attribute, value))


def _compare_shapes_outside(surgery: Surgery, dense: nn.Module, small: nn.Module) -> None:
    """Outside the layers nothing may change its shape, but for a part for each layer (Gemma 3n's embeddings)."""
    path, kept, layers = surgery.decoder.path, surgery.kept, len(surgery.decoder.layers)
    outside = {n: s for n, s in shapes_of(dense).items() if not n.startswith(f"{path}.")}
    for name, shape in shapes_of(small).items():
        if name.startswith(f"{path}."):
            continue
        before = outside.pop(name, None)
        if before == shape:
            continue
        axes = [i for i, (a, b) in enumerate(zip(before or (), shape or (), strict=False)) if a != b]
        if before is None or shape is None or len(before) != len(shape) or len(axes) != 1:
            raise UnsupportedModel(f"{name} depends on the number of layers (it becomes {shape})")
        if before[axes[0]] % layers or shape[axes[0]] * layers != before[axes[0]] * len(kept):
            raise UnsupportedModel(f"{name} depends on the number of layers (it becomes {shape})")
        surgery.parts.append((name, axes[0]))
    if outside:
        raise UnsupportedModel(f"{sorted(outside)[0]} would vanish with the removed layers")


def _swap_configs(surgery: Surgery, old: nn.Module, new: nn.Module, live: nn.Module) -> None:
    """Modules may hold a configuration of their own, a copy made from the model's: it is cut like that one."""
    for name, value in vars(live).items():
        if not isinstance(value, PreTrainedConfig) or any(value is known for known, _ in surgery.configs):
            continue
        before, after = vars(old).get(name), vars(new).get(name)
        if isinstance(before, PreTrainedConfig) and isinstance(after, PreTrainedConfig):
            if before.to_dict() == after.to_dict():
                continue
            own = copy.deepcopy(after)
            own._attn_implementation = value._attn_implementation  # chosen when loading; not part of the config
            surgery.configs.append((value, own))


def _check_cache(old: Any, new: Any) -> None:
    """A cache counts its tokens in attention layers: a hybrid that has lost all of them cannot generate."""
    lost = _cache_error(new)
    if lost is not None and _cache_error(old) is None:
        raise UnsupportedModel("no attention layer would be left, and a cache counts its tokens in one")


def _cache_error(config: Any) -> Exception | None:
    try:
        DynamicCache(config=config).get_seq_length()
    except Exception as error:
        return error
    return None


def _compare_modules(surgery: Surgery, old: nn.Module, new: nn.Module, live: nn.Module, where: str, shift: int) -> None:
    old_modules, new_modules = dict(old.named_modules()), dict(new.named_modules())
    if {n: type(m) for n, m in old_modules.items()} != {n: type(m) for n, m in new_modules.items()}:
        raise UnsupportedModel(
            f"{where} would become another kind of layer: its config has a rule on the layer's index"
        )
    if shapes_of(old) != shapes_of(new):
        raise UnsupportedModel(f"{where} would change its shape: its config has a rule on the layer's index")
    for name, module in old_modules.items():
        target = _live(live, name)
        _swap_configs(surgery, module, new_modules[name], target)
        before, after = _plain(module), _plain(new_modules[name])
        for attribute in sorted(before.keys() | after.keys()):
            a, b = before.get(attribute), after.get(attribute)
            if _equal(a, b):
                continue
            if _equal(_of_kept(a, surgery), b):  # of every layer's, not this one's
                surgery.attributes.append((target, attribute, b))
                continue
            numbered = type(a) is int and type(b) is int and (b - a == shift or attribute in INDEX_NAMES)
            if numbered and hasattr(target, attribute):
                surgery.attributes.append((target, attribute, b))
            else:
                raise UnsupportedModel(
                    f"{where}: {name or 'the layer'}.{attribute} depends on the layer's index "
                    f"({a!r} would become {b!r})"
                )


def _of_kept(value: Any, surgery: Surgery) -> Any:
    """A list with an entry for each layer, a list of layers, or a dict by layer, as it is for the kept ones."""
    if isinstance(value, (list, tuple)) and len(value) == len(surgery.decoder.layers):
        return [value[i] for i in surgery.kept]
    if isinstance(value, (list, tuple)) and all(type(item) is int for item in value):
        return [surgery.kept.index(item) for item in value if item in surgery.kept]
    if isinstance(value, dict) and all(type(key) is int for key in value):
        return {new: value[old] for new, old in enumerate(surgery.kept) if old in value}
    return value


def _live(layer: nn.Module, path: str) -> nn.Module:
    module = layer
    for part in path.split(".") if path else []:
        while not hasattr(module, part) and hasattr(module, "base_layer"):  # adapters may be nested
            module = module.base_layer  # type: ignore[assignment]
        module = getattr(module, part)
    module = getattr(module, CHECKPOINTED, module)
    while hasattr(module, "base_layer"):
        module = module.base_layer  # type: ignore[assignment]
    return module


def _plain(module: nn.Module, also: tuple[str, ...] = ()) -> dict[str, Any]:
    """Attributes that a layer's behaviour may hang on: numbers, strings, and lists and dicts of them."""
    return {
        name: value
        for name, value in vars(module).items()
        if (not name.startswith("_") or name in also) and name != "training" and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, set)):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(_is_plain(item) for item in (*value, *value.values()))
    return isinstance(value, PLAIN)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):  # JSON has no tuples
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-12) or (math.isnan(a) and math.isnan(b))
    return type(a) is type(b) and a == b


def _renumber_by_name(surgery: Surgery) -> None:
    """A model without a transformers config: only the attributes everybody calls by these names."""
    for new, old in enumerate(surgery.kept):
        for module in surgery.decoder.layers[old].modules():
            for name in INDEX_NAMES:
                if vars(module).get(name) == old:
                    surgery.attributes.append((module, name, new))
