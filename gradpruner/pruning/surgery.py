"""Plan how decoder layers are removed so that nothing else changes, or refuse to.

A layer may depend on its index through its own `layer_idx`, through per-layer lists in the config, or through rules on
the index. So the configuration is cut first. Then the dense and the cut model are built from their configurations on
the meta device and compared layer by layer: class, names, shapes and every plain attribute. What differs is an index
to renumber, or a reason to refuse (docs/method.md, section 5).
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn
from transformers import DynamicCache, PreTrainedConfig

from gradpruner.errors import UnsupportedModel
from gradpruner.model.config import text_config
from gradpruner.model.decoder import Decoder
from gradpruner.model.empty_model import absent_counts, build_empty, shapes_of
from gradpruner.model.extra_layers import generation_changes, without_extra
from gradpruner.model.layer_config import cut_config, renumber_modules
from gradpruner.pruning.prepared_surgery import Attribute, PartPerLayer, Surgery, live_module

INDEX_NAMES = ("layer_idx", "layer_id", "layer_index", "layer_number")
PER_INSTANCE = ("_tied_weights_keys", "_keys_to_ignore_on_load_unexpected")  # transformers' own; may name layers
PLAIN = (bool, int, float, str, type(None))


def prepare(decoder: Decoder, kept: tuple[int, ...]) -> Surgery:
    """Check that some layers can stand alone, and that each stays what it was. Changes nothing.

    Args:
        decoder: the model.
        kept: the layers to keep, ascending.

    Returns:
        The removal of the other layers.

    Raises:
        UnsupportedModel: something in the model would change. The message names it.

    Source: docs/method.md, section 5.
    """
    _check_one_stream(decoder)
    if not hasattr(decoder.config, "get_text_config"):
        return Surgery(decoder, kept, attributes=tuple(_indices_by_name(decoder, kept)))
    # 1. Cut the configuration.
    old, new = decoder.config, cut_config(decoder.config, kept, len(decoder.layers))
    absent = absent_counts(type(decoder.base), old)
    if absent:
        new = without_extra(new)
    if getattr(new, "quantization_config", None) is not None:
        renumber_modules(new.quantization_config, decoder.path, kept)
    configs = [(old, new)]
    if text_config(old) is not old:
        configs.append((text_config(old), text_config(new)))
    # 2. Build both models from their configurations, without values.
    dense = build_empty(type(decoder.base), old)
    small = build_empty(type(decoder.base), _as_reloaded(new))
    _check_described(decoder, dense)
    # 3. Compare them. What differs in the layers is an index or refused; what differs outside follows the config.
    attributes = [
        *_generation_attributes(decoder, kept, extra_gone=bool(absent)),
        *_attributes_in_layers(decoder, kept, dense, small),
    ]
    parts = list(_parts_per_layer(decoder, kept, dense, small))
    modules = list(_same_modules(decoder, kept, dense, small))
    attributes += _attributes_outside(decoder, modules)
    _check_cache(old, new)
    configs += _own_configs(modules, configs)
    return Surgery(decoder, kept, tuple(configs), tuple(attributes), tuple(parts), tuple(absent))


def _check_one_stream(decoder: Decoder) -> None:
    """Refuse layers with two streams of hidden states (Reformer): only one is passed on."""
    for layer in decoder.layers:
        names = list(inspect.signature(layer.forward).parameters)
        if "hidden_states" in names[1:]:
            raise UnsupportedModel(f"{type(layer).__name__} takes {names[0]} beside hidden_states: two streams")


def _indices_by_name(decoder: Decoder, kept: tuple[int, ...]) -> Iterator[Attribute]:
    """Renumber a model without a transformers config by the usual names of an index."""
    for new, old in enumerate(kept):
        for module in decoder.layers[old].modules():
            for name in INDEX_NAMES:
                if vars(module).get(name) == old:
                    yield Attribute(module, name, new)


def _as_reloaded(config: Any) -> Any:
    """Give the config that a reload will see: what JSON holds and the class accepts."""
    try:
        return type(config).from_dict(config.to_dict())
    except Exception as error:
        raise UnsupportedModel(f"the cut config of {type(config).__name__} is not accepted: {error}") from error


def _check_described(decoder: Decoder, dense: nn.Module) -> None:
    """Refuse a model whose parameters are not those that its config describes."""
    actual, described = shapes_of(decoder.base), shapes_of(dense)
    for name in sorted(actual.keys() | described.keys()):
        if name not in actual or name not in described:
            where = "has no" if name not in actual else "has an undescribed"
            raise UnsupportedModel(f"the model is not what its config describes: it {where} parameter {name!r}")
        if actual[name] is not None and actual[name] != described[name]:
            raise UnsupportedModel(
                f"the model is not what its config describes: {name} has shape {actual[name]}, not {described[name]}"
            )


def _generation_attributes(decoder: Decoder, kept: tuple[int, ...], *, extra_gone: bool) -> list[Attribute]:
    """What changes in the generation config, where the model has one."""
    generation = getattr(decoder.base, "generation_config", None)
    if generation is None:
        return []
    changes = generation_changes(vars(generation), kept, extra_gone=extra_gone)
    return [Attribute(generation, name, value) for name, value in changes.items()]


def _attributes_in_layers(
    decoder: Decoder, kept: tuple[int, ...], dense: nn.Module, small: nn.Module
) -> Iterator[Attribute]:
    """Compare each kept layer with the one that the cut config describes in its place."""
    before, after = dense.get_submodule(decoder.path), small.get_submodule(decoder.path)
    assert isinstance(before, nn.ModuleList) and isinstance(after, nn.ModuleList)
    if len(after) != len(kept):
        raise UnsupportedModel(f"a model rebuilt from the cut config has {len(after)} layers, not {len(kept)}")
    for new, old in enumerate(kept):
        yield from _attributes_in_layer(decoder, kept, before[old], after[new], new)


def _attributes_in_layer(
    decoder: Decoder, kept: tuple[int, ...], before: nn.Module, after: nn.Module, new: int
) -> Iterator[Attribute]:
    """Compare one layer as it was with itself under its new index."""
    old = kept[new]
    modules, modules_after = dict(before.named_modules()), dict(after.named_modules())
    if {n: type(m) for n, m in modules.items()} != {n: type(m) for n, m in modules_after.items()}:
        raise UnsupportedModel(
            f"layer {old} would become another kind of layer: its config has a rule on the layer's index"
        )
    if shapes_of(before) != shapes_of(after):
        raise UnsupportedModel(f"layer {old} would change its shape: its config has a rule on the layer's index")
    for path, module in modules.items():
        live = live_module(decoder.layers[old], path)
        values, values_after = _plain(module), _plain(modules_after[path])
        for name in sorted(values.keys() | values_after.keys()):
            value, value_after = values.get(name), values_after.get(name)
            if _equal(value, value_after):
                continue
            if _equal(_of_kept(value, kept, len(decoder.layers)), value_after):  # it is about all layers
                yield Attribute(live, name, value_after)
                continue
            numbers = type(value) is int and type(value_after) is int
            is_index = numbers and (value_after - value == new - old or name in INDEX_NAMES)  # type: ignore[operator]
            if not is_index or not hasattr(live, name):
                raise UnsupportedModel(
                    f"layer {old}: {path or 'the layer'}.{name} depends on the layer's index "
                    f"({value!r} would become {value_after!r})"
                )
            yield Attribute(live, name, value_after)


def _parts_per_layer(
    decoder: Decoder, kept: tuple[int, ...], dense: nn.Module, small: nn.Module
) -> Iterator[PartPerLayer]:
    """Refuse outer parameters that change their shape, except one part per layer (Gemma 3n)."""
    inside, layers = f"{decoder.path}.", len(decoder.layers)
    shapes = {name: shape for name, shape in shapes_of(dense).items() if not name.startswith(inside)}
    for name, after in shapes_of(small).items():
        if name.startswith(inside):
            continue
        before = shapes.pop(name, None)
        if before == after:
            continue
        sizes = list(zip(before or (), after or (), strict=False))
        axes = [axis for axis, (a, b) in enumerate(sizes) if a != b]
        one_part_each = len(axes) == 1 and len(before or ()) == len(after or ())
        one_part_each = one_part_each and all(a % layers == 0 for a, b in sizes if a != b)
        if not one_part_each or any(b * layers != a * len(kept) for a, b in sizes if a != b):
            raise UnsupportedModel(f"{name} depends on the number of layers (it becomes {after})")
        yield PartPerLayer(name, axes[0])
    if shapes:
        raise UnsupportedModel(f"{sorted(shapes)[0]} would vanish with the removed layers")


class _SameModule(NamedTuple):
    """One module in the empty dense model, in the empty cut model, and in the model itself."""

    dense: nn.Module
    small: nn.Module
    live: nn.Module
    is_outside: bool  # of the layers


def _same_modules(decoder: Decoder, kept: tuple[int, ...], dense: nn.Module, small: nn.Module) -> Iterator[_SameModule]:
    """All modules of the kept layers and outside the layers."""
    for new, old in enumerate(kept):
        after = small.get_submodule(f"{decoder.path}.{new}")
        for path, module in dense.get_submodule(f"{decoder.path}.{old}").named_modules():
            yield _SameModule(module, after.get_submodule(path), live_module(decoder.layers[old], path), False)
    for path, module in dense.named_modules():
        if path != decoder.path and not path.startswith(f"{decoder.path}."):
            yield _SameModule(module, small.get_submodule(path), decoder.base.get_submodule(path), True)


def _attributes_outside(decoder: Decoder, modules: Iterable[_SameModule]) -> Iterator[Attribute]:
    """Attributes outside the layers that follow from the config, such as a count of layers."""
    for dense, small, live, is_outside in modules:
        if not is_outside:
            continue
        before = _plain(dense, PER_INSTANCE)
        for name, value in _plain(small, PER_INSTANCE).items():
            if name in before and not _equal(before[name], value) and hasattr(live, name):
                yield Attribute(live, name, value)


def _own_configs(modules: Iterable[_SameModule], known: Iterable[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Cut the configs that modules hold as copies of the model's, as that one is cut."""
    known_ids, found = {id(old) for old, _ in known}, []
    for dense, small, live, _ in modules:
        for name, value in vars(live).items():
            if not isinstance(value, PreTrainedConfig) or id(value) in known_ids:
                continue
            before, after = vars(dense).get(name), vars(small).get(name)
            if not isinstance(before, PreTrainedConfig) or not isinstance(after, PreTrainedConfig):
                continue
            if before.to_dict() != after.to_dict():
                own = copy.deepcopy(after)
                own._attn_implementation = value._attn_implementation  # chosen when loading; not part of the config
                found.append((value, own))
                known_ids.add(id(value))
    return found


def _check_cache(old: Any, new: Any) -> None:
    """Refuse a hybrid that loses all attention layers: its cache counts tokens in them."""
    if _has_cache(old) and not _has_cache(new):
        raise UnsupportedModel("no attention layer would be left, and a cache counts its tokens in one")


def _has_cache(config: Any) -> bool:
    try:
        DynamicCache(config=config).get_seq_length()
    except Exception:  # whatever it is, generation would end with it
        return False
    return True


def _of_kept(value: Any, kept: tuple[int, ...], layers: int) -> Any:
    """Cut a list by layer, a list of layers, or a dict by layer to the kept ones."""
    if isinstance(value, (list, tuple)) and len(value) == layers:
        return [value[i] for i in kept]
    if isinstance(value, (list, tuple)) and all(type(item) is int for item in value):
        return [kept.index(item) for item in value if item in kept]
    if isinstance(value, dict) and all(type(key) is int for key in value):
        return {new: value[old] for new, old in enumerate(kept) if old in value}
    return value


def _plain(module: nn.Module, also: tuple[str, ...] = ()) -> dict[str, Any]:
    """Collect what a layer may depend on: numbers, strings, lists and dicts of them."""
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
