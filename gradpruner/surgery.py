"""Removing decoder layers from a transformers model so that nothing else changes, or refusing to.

A layer's behaviour may depend on its index through its own `layer_idx`, through per-layer lists in the config, or
through rules on the index. So the configuration is cut first; then the dense and the cut model are built from
their configurations on the meta device and compared layer by layer, in class, names, shapes and every
plain attribute. What differs is an index to renumber, or a reason to refuse (METHOD section 3, "Removing layers").
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gradpruner.decoder import Decoder, base_name
from gradpruner.errors import UnsupportedModel

# Lists with one entry a layer, under every name transformers 5 uses for them.
PER_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "block_types",
    "attention_layers",
    "no_rope_layers",
    "layer_rope_theta",
    "num_attention_heads_per_layer",
    "activation_sparsity_pattern",
    "indexer_types",
)
# Lists of layer indices.
INDEX_LISTS = ("moe_layers", "attn_layer_indices", "full_attn_idxs", "cross_attention_layers")
# The first so many layers are dense.
LEADING_DENSE = ("first_k_dense_replace", "num_dense_layers")
INDEX_NAMES = ("layer_idx", "layer_id", "layer_index", "layer_number")
PLAIN = (bool, int, float, str, type(None))


@dataclass
class Surgery:
    """A checked removal, not yet done: `perform()` does it and returns the function that undoes it."""

    decoder: Decoder
    kept: tuple[int, ...]
    configs: list[tuple[Any, Any]] = field(default_factory=list)  # (old object, its replacement)
    attributes: list[tuple[nn.Module, str, Any]] = field(default_factory=list)

    def perform(self) -> Callable[[], None]:
        """Cut the list of layers, renumber, swap the config; nothing in here can fail half way for good."""
        base, path = self.decoder.base, self.decoder.path
        parent_path, _, leaf = path.rpartition(".")
        parent, old_layers = base.get_submodule(parent_path), self.decoder.layers
        undo: list[tuple[nn.Module, str, Any]] = []

        def assign(module: nn.Module, name: str, value: Any) -> None:
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
            assign(parent, leaf, nn.ModuleList([old_layers[i] for i in self.kept]))
        except BaseException:
            restore()
            raise
        return restore


def prepare(decoder: Decoder, kept: tuple[int, ...]) -> Surgery:
    """Check that the layers in `kept` can stand alone and each stay what it was. Changes nothing.

    Raises UnsupportedModel naming what would change.
    """
    surgery = Surgery(decoder, kept)
    if not hasattr(decoder.config, "get_text_config"):
        _renumber_by_name(surgery)
        return surgery
    old, new = decoder.config, cut_config(decoder.config, kept, len(decoder.layers))
    surgery.configs = [(old, new)]
    if old.get_text_config(decoder=True) is not old:
        surgery.configs.append((old.get_text_config(decoder=True), new.get_text_config(decoder=True)))
    dense = build_empty(type(decoder.base), old)
    small = build_empty(type(decoder.base), _as_reloaded(new))
    _check_described(decoder, dense)
    _compare(surgery, dense, small)
    return surgery


def cut_config(config: Any, kept: tuple[int, ...], layers: int) -> Any:
    """A copy of `config` for the kept layers: count, per-layer lists, lists of indices, rules on an index."""
    new = copy.deepcopy(config)
    text = new.get_text_config(decoder=True)
    old = config.get_text_config(decoder=True)
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for name in PER_LAYER:
        values = getattr(old, name, None)
        if isinstance(values, (list, tuple)) and len(values) == layers:
            changes[name] = type(values)(values[i] for i in kept)
    for name in INDEX_LISTS:
        values = getattr(old, name, None)
        if isinstance(values, (list, tuple)):
            changes[name] = type(values)(i for i, layer in enumerate(kept) if layer in values)
    for name in LEADING_DENSE:
        if isinstance(getattr(old, name, None), int):
            changes[name] = sum(layer < getattr(old, name) for layer in kept)
    step = getattr(old, "decoder_sparse_step", None)
    if isinstance(step, int) and isinstance(getattr(old, "mlp_only_layers", None), (list, tuple)):
        dense = [i for i, layer in enumerate(kept) if layer in old.mlp_only_layers or (layer + 1) % step]
        changes |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    if (
        isinstance(getattr(old, "attention_types", None), list) and "attention_layers" in changes
    ):  # GPT-Neo's run lengths
        changes["attention_types"] = [[[kind], 1] for kind in changes["attention_layers"]]
    for name, value in changes.items():
        try:
            setattr(text, name, value)
        except (AttributeError, TypeError, ValueError) as error:
            raise UnsupportedModel(
                f"config.{name} of {type(old).__name__} cannot be set to {value!r}: {error}"
            ) from error
    return new


def _as_reloaded(config: Any) -> Any:
    """What a reload will see is what JSON holds, and what the class accepts of it."""
    try:
        return type(config).from_dict(config.to_dict())
    except Exception as error:
        raise UnsupportedModel(f"the cut config of {type(config).__name__} is not accepted: {error}") from error


def build_empty(kind: type[nn.Module], config: Any) -> nn.Module:
    """A model of this class and config on the meta device: names, shapes and attributes, no data."""
    try:
        with torch.device("meta"):
            return kind(copy.deepcopy(config))
    except Exception as error:
        raise UnsupportedModel(f"{kind.__name__} cannot be rebuilt from its config: {error}") from error


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...] | None]:
    """Name to shape, without adapters; None where a quantiser packed the parameter."""
    return {
        name: tuple(tensor.shape) if tensor.is_floating_point() else None
        for raw, tensor in model.named_parameters(remove_duplicate=False)
        if (name := base_name(raw)) is not None
    }


def _check_described(decoder: Decoder, dense: nn.Module) -> None:
    actual, described = _shapes(decoder.base), _shapes(dense)
    for name in actual.keys() | described.keys():
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
    outside = {n: s for n, s in _shapes(dense).items() if not n.startswith(f"{path}.")}
    for name, shape in _shapes(small).items():
        if not name.startswith(f"{path}.") and outside.pop(name, None) != shape:
            raise UnsupportedModel(f"{name} depends on the number of layers (it becomes {shape})")
    if outside:
        raise UnsupportedModel(f"{sorted(outside)[0]} would vanish with the removed layers")
    for name, module in dense.named_modules():
        if name == path or name.startswith(f"{path}."):
            continue
        other = small.get_submodule(name)
        live = base.get_submodule(name)
        for attribute, value in _plain(other).items():  # e.g. a count of layers, "has any sliding layer"
            if (
                attribute in _plain(module)
                and not _equal(_plain(module)[attribute], value)
                and hasattr(live, attribute)
            ):
                surgery.attributes.append((live, attribute, value))


def _compare_modules(surgery: Surgery, old: nn.Module, new: nn.Module, live: nn.Module, where: str, shift: int) -> None:
    old_modules, new_modules = dict(old.named_modules()), dict(new.named_modules())
    if {n: type(m) for n, m in old_modules.items()} != {n: type(m) for n, m in new_modules.items()}:
        raise UnsupportedModel(
            f"{where} would become another kind of layer: its config has a rule on the layer's index"
        )
    if _shapes(old) != _shapes(new):
        raise UnsupportedModel(f"{where} would change its shape: its config has a rule on the layer's index")
    for name, module in old_modules.items():
        before, after = _plain(module), _plain(new_modules[name])
        for attribute in before.keys() | after.keys():
            a, b = before.get(attribute), after.get(attribute)
            if _equal(a, b):
                continue
            target = _live(live, name)
            if type(a) is int and type(b) is int and b - a == shift and hasattr(target, attribute):
                surgery.attributes.append((target, attribute, b))
            else:
                raise UnsupportedModel(
                    f"{where}: {name or 'the layer'}.{attribute} depends on the layer's index "
                    f"({a!r} would become {b!r})"
                )


def _live(layer: nn.Module, path: str) -> nn.Module:
    module = layer
    for part in path.split(".") if path else []:
        if not hasattr(module, part) and hasattr(module, "base_layer"):
            module = module.base_layer  # type: ignore[assignment]
        module = getattr(module, part)
    return getattr(module, "base_layer", module)


def _plain(module: nn.Module) -> dict[str, Any]:
    """Attributes that a layer's behaviour may hang on: numbers, strings, and lists of them."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, PLAIN)


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and (a == b or (a != a and b != b))


def _renumber_by_name(surgery: Surgery) -> None:
    """A model without a transformers config: only the attributes everybody calls by these names."""
    for new, old in enumerate(surgery.kept):
        for module in surgery.decoder.layers[old].modules():
            for name in INDEX_NAMES:
                if vars(module).get(name) == old:
                    surgery.attributes.append((module, name, new))
