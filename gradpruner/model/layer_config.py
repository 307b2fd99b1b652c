"""Rewrite a transformers configuration for the kept layers alone.

The rules go by the names of the fields, never by the name of the model. Whether a rule was right is not decided here:
the surgery compares the models that both configurations describe.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gradpruner.errors import UnsupportedModel
from gradpruner.model.config import layer_counts, text_config

# Lists with one entry per layer, under every name that transformers 5 uses for them.
PER_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "attention_layers",
    "no_rope_layers",
    "layer_rope_theta",
    "num_attention_heads_per_layer",
    "num_key_value_heads_per_layer",
    "intermediate_size",
    "moe_intermediate_size",
    "num_experts",
    "moe_topk",
    "activation_sparsity_pattern",
    "sliding_windows",
    "swiglu_limits",
    "swiglu_limits_shared",
    "indexer_types",
)
PATTERNS = ("block_types",)  # short lists of that kind, repeated until there are enough layers
# Lists of layer indices.
INDEX_LISTS = (
    "moe_layers",
    "attn_layer_indices",
    "full_attn_idxs",
    "cross_attention_layers",
    "local_layer_ids",
    "ple_layer_ids",
    "rope_scaling_layers",
    "hybrid_layer_ids",
)
SOURCES = ("kv_source_layers",)  # for each layer, the index of the layer whose keys and values it reuses
SHARED = ("indexer_types",)  # a "shared" layer reuses the result of the last layer before it that is not
# Layer indices, or counts of the first layers. The new value is the number of kept layers below the old value.
BOUNDARIES = (
    "first_k_dense_replace",
    "num_dense_layers",
    "n_input_layers",
    "loop_layer_index_start",
    "loop_layer_index_end",
    "max_window_layers",
)
SCALES = ("scale_depth",)  # factors of residuals, which the model divides by the root of its number of layers
LAST = ("num_kv_shared_layers", "n_output_layers")  # counts of the last layers
PERIODS = ("attn_layer", "expert_layer")  # of X_period and X_offset: layer i is an X if i % period == offset


def cut_config(config: Any, kept: tuple[int, ...], layers: int) -> Any:
    """Return a copy of a configuration that describes the kept layers alone.

    Args:
        config: a transformers configuration. It is not changed.
        kept: indices of the kept layers, ascending.
        layers: how many layers the dense model has.

    Raises:
        UnsupportedModel: a kept layer needs a removed one, or the configuration refuses a new value.
    """
    new = copy.deepcopy(config)
    text, old = text_config(new), text_config(config)
    _keep_visual_targets(new, kept)
    overrides = old.to_dict().get("per_layer_config")  # what single layers have of their own, by index
    if overrides:
        text.per_layer_config = None
    for name, value in _changes(old, kept, layers).items():
        _set(text, name, value)
    if overrides:
        own = {int(layer): values for layer, values in overrides.items()}
        text.per_layer_config = {i: own[layer] for i, layer in enumerate(kept) if layer in own}
    return new


def _changes(old: Any, kept: tuple[int, ...], layers: int) -> dict[str, Any]:
    """The fields that all rules change, with their new values."""
    changes: dict[str, Any] = {}
    for rule in RULES:
        changes |= rule(old, kept, layers)
    return changes


def _set(text: Any, name: str, value: Any) -> None:
    name = getattr(text, "attribute_map", {}).get(name, name)
    computed = getattr(type(text), name, None)
    if isinstance(computed, property) and computed.fset is None:
        return  # follows from other fields; the surgery finds out whether it follows rightly
    try:
        setattr(text, name, value)
    except (AttributeError, TypeError, ValueError) as error:
        raise UnsupportedModel(f"config.{name} of {type(text).__name__} cannot be set to {value!r}: {error}") from error


# The rules. Each takes the dense text configuration, the kept layers and the number of layers, and returns the fields
# of one family with their new values. Fields that the configuration does not have are left out.


def _counts(old: Any, kept: tuple[int, ...], layers: int) -> dict[str, Any]:
    """The number of layers."""
    return {name: len(kept) for name, count in layer_counts(old) if count == layers}


def _per_layer_lists(old: Any, kept: tuple[int, ...], layers: int) -> dict[str, Any]:
    """Lists with one entry per layer. A list of another length means something else, and stays."""
    lists = _lists(old, PER_LAYER)
    return {name: type(values)(values[i] for i in kept) for name, values in lists if len(values) == layers}


def _sliding_window(old: Any, kept: tuple[int, ...], layers: int) -> dict[str, Any]:
    """The window of attention, where no layer with a window is kept.

    vLLM applies the window to every layer of a model whose layers are all of one type. So the window becomes as long
    as the longest input. None is not always accepted in its place.
    """
    types = _per_layer_lists(old, kept, layers).get("layer_types")
    longest = getattr(old, "max_position_embeddings", None)
    if types is None or not longest or not isinstance(getattr(old, "sliding_window", None), int):
        return {}
    return {"sliding_window": longest} if _has_window(old.layer_types) and not _has_window(types) else {}


def _has_window(types: Sequence[str]) -> bool:
    return any("sliding" in name for name in types)


def _patterns(old: Any, kept: tuple[int, ...], layers: int) -> dict[str, Any]:
    """Short lists that are repeated: each becomes a list with one entry per kept layer."""
    lists = _lists(old, PATTERNS)
    return {name: type(values)(values[i % len(values)] for i in kept) for name, values in lists}


def _index_lists(old: Any, kept: tuple[int, ...], layers: int) -> dict[str, Any]:
    """Lists of layer indices: those of kept layers, by their new numbers."""
    lists = _lists(old, INDEX_LISTS)
    return {name: type(values)(i for i, layer in enumerate(kept) if layer in values) for name, values in lists}


def _shared_layers(old: Any, kept: tuple[int, ...], layers: int) -> dict[str, Any]:
    """Layers that reuse what an earlier layer computed. That layer must be kept too."""
    for name, types in _lists(old, SHARED):
        computing = [layer for layer, kind in enumerate(types) if kind != "shared"]
        sources = [max((i for i in computing if i <= layer), default=layer) for layer in range(len(types))]
        _check_sources(name, sources, kept)
    return {}


def _source_layers(old: Any, kept: tuple[int, ...], layers: int) -> dict[str, Any]:
    """For each layer the index of the layer that it reuses: by the new numbers."""
    changes = {}
    for name, sources in _lists(old, SOURCES):
        _check_sources(name, sources, kept)
        changes[name] = type(sources)(kept.index(sources[layer]) for layer in kept)
    return changes


def _check_sources(name: str, sources: Sequence[int], kept: tuple[int, ...]) -> None:
    for layer in kept:
        if sources[layer] not in kept:
            raise UnsupportedModel(
                f"layer {layer} uses what layer {sources[layer]} computes (config.{name}): that one must be kept too"
            )


def _boundaries(old: Any, kept: tuple[int, ...], layers: int) -> dict[str, Any]:
    """Boundaries between the first layers and the others."""
    return {name: sum(layer < value for layer in kept) for name, value in _numbers(old, BOUNDARIES)}


def _last_layers(old: Any, kept: tuple[int, ...], layers: int) -> dict[str, Any]:
    """Counts of the last layers."""
    return {name: sum(layer >= layers - value for layer in kept) for name, value in _numbers(old, LAST)}


def _recurrent_layers(old: Any, kept: tuple[int, ...], layers: int) -> dict[str, Any]:
    """The number of layers between the input layers and the output layers."""
    if not isinstance(getattr(old, "n_recurrent_layers", None), int):
        return {}
    first = _boundaries(old, kept, layers)["n_input_layers"]
    last = _last_layers(old, kept, layers)["n_output_layers"]
    return {"n_recurrent_layers": len(kept) - first - last}


def _scales(old: Any, kept: tuple[int, ...], layers: int) -> dict[str, Any]:
    """Factors that the model divides by the root of its number of layers.

    The quotient stays as it was.
    """
    values = ((name, getattr(old, name, None)) for name in SCALES)
    return {name: value * math.sqrt(len(kept) / layers) for name, value in values if isinstance(value, (int, float))}


def _periods(old: Any, kept: tuple[int, ...], layers: int) -> dict[str, Any]:
    """Layers of one type at regular distances: the new period and offset, if there are any."""
    changes: dict[str, Any] = {}
    for name in PERIODS:
        period, offset = getattr(old, f"{name}_period", None), getattr(old, f"{name}_offset", None)
        if isinstance(period, int) and isinstance(offset, int):
            regular = _period([layer % period == offset for layer in kept])
            if regular is not None:
                changes |= {f"{name}_period": regular[0], f"{name}_offset": regular[1]}
    return changes


def _period(chosen: list[bool]) -> tuple[int, int] | None:
    """The smallest period, with its offset, that chooses exactly these layers, or None."""
    for period in range(1, len(chosen) + 2):
        for offset in range(period):
            if [i % period == offset for i in range(len(chosen))] == chosen:
                return period, offset
    return None


def _sparse_steps(old: Any, kept: tuple[int, ...], layers: int) -> dict[str, Any]:
    """Experts in every n-th layer, except in listed layers.

    After the cut n is 1, and the list names all layers without experts.
    """
    step, dense = getattr(old, "decoder_sparse_step", None), getattr(old, "mlp_only_layers", None)
    if not isinstance(step, int) or not isinstance(dense, (list, tuple)):
        return {}
    still_dense = [i for i, layer in enumerate(kept) if layer in dense or (layer + 1) % step]
    return {"mlp_only_layers": still_dense, "decoder_sparse_step": 1}


def _run_lengths(old: Any, kept: tuple[int, ...], layers: int) -> dict[str, Any]:
    """GPT-Neo's types of attention, as pairs of a pattern and how often it is repeated."""
    types = _per_layer_lists(old, kept, layers).get("attention_layers")
    if types is None or not isinstance(getattr(old, "attention_types", None), list):
        return {}
    return {"attention_types": [[[kind], 1] for kind in types]}


RULES: tuple[Callable[[Any, tuple[int, ...], int], dict[str, Any]], ...] = (
    _counts,
    _per_layer_lists,
    _sliding_window,
    _patterns,
    _index_lists,
    _shared_layers,
    _source_layers,
    _boundaries,
    _last_layers,
    _recurrent_layers,
    _scales,
    _periods,
    _sparse_steps,
    _run_lengths,
)


def _lists(config: Any, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """The fields among `names` that hold a list with entries."""
    values = ((name, getattr(config, name, None)) for name in names)
    return ((name, value) for name, value in values if isinstance(value, (list, tuple)) and value)


def _numbers(config: Any, names: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """The fields among `names` that hold a whole number."""
    values = ((name, getattr(config, name, None)) for name in names)
    return ((name, value) for name, value in values if isinstance(value, int))


def _keep_visual_targets(config: Any, kept: tuple[int, ...]) -> None:
    """Renumber the layers that a vision tower feeds. Refuse to remove one of them."""
    for part in vars(config).values():
        count = len(getattr(part, "deepstack_visual_indexes", None) or ())
        if kept[:count] != tuple(range(count)):
            raise UnsupportedModel(f"the first {count} layers take what deepstack layers of the vision tower see")
    mapped, spatial = (getattr(config, name, None) for name in ("deepstack_layer_map", "spatial_target_layers"))
    fed = [layer for _, layer in mapped or ()] + list(spatial or ())
    if not set(fed) <= set(kept):
        raise UnsupportedModel(f"layers {sorted(set(fed) - set(kept))} take what layers of the vision tower see")
    if mapped:
        config.deepstack_layer_map = [(source, kept.index(layer)) for source, layer in mapped]
    if spatial:
        config.spatial_target_layers = [kept.index(layer) for layer in spatial]


def renumber_modules(quantisation: Any, path: str, kept: tuple[int, ...]) -> None:
    """Renumber the modules that a quantisation config names, such as those it leaves alone.

    Args:
        quantisation: the quantisation config, an object or a dict. It is changed in place. Names of modules in
            removed layers are taken out.
        path: where the decoder layers are in the model, e.g. "model.layers".
        kept: indices of the kept layers, ascending.
    """
    fields = quantisation if isinstance(quantisation, dict) else vars(quantisation)
    number = re.compile(rf"((?:^|\.){re.escape(path.rpartition('.')[2])}\.)(\d+)(?=\.|$)")
    for field, names in fields.items():
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            matches = [(name, number.search(name)) for name in names]
            fields[field] = [
                name if match is None else number.sub(rf"\g<1>{kept.index(int(match[2]))}", name)
                for name, match in matches
                if match is None or int(match[2]) in kept
            ]
