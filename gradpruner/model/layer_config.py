"""What the fields of a transformers configuration mean for its layers: the configuration of the kept layers alone.

By the fields' names, never by the model's. Whether a rule was right is not decided here: the surgery compares the
models that both configurations describe.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from gradpruner.errors import UnsupportedModel
from gradpruner.model.config import layer_counts, text_config

# Lists with one entry a layer, under every name transformers 5 uses for them.
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
PATTERNS = ("block_types",)  # such a list, repeated until there are enough layers
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
SOURCES = ("kv_source_layers",)  # one index a layer: of the layer whose keys and values it takes
SHARED = ("indexer_types",)  # a "shared" layer takes what the last other one before it has computed
# Layer indices, or counts of the first layers: as many kept layers lie below the new one as below the old one.
BOUNDARIES = (
    "first_k_dense_replace",
    "num_dense_layers",
    "n_input_layers",
    "loop_layer_index_start",
    "loop_layer_index_end",
    "max_window_layers",
)
SCALES = ("scale_depth",)  # of residuals, divided by the root of the number of layers
LAST = ("num_kv_shared_layers", "n_output_layers")  # counts of the last layers
PERIODS = ("attn_layer", "expert_layer")  # X_period and X_offset: layer i is one if i % period == offset


def cut_config(config: Any, kept: tuple[int, ...], layers: int) -> Any:
    """A copy of `config` for the kept layers: count, per-layer lists, lists of indices, rules on an index."""
    new = copy.deepcopy(config)
    text, old = text_config(new), text_config(config)
    _keep_visual_targets(new, kept)
    overrides = old.to_dict().get("per_layer_config")  # what some layers have of their own, by index
    if overrides:
        text.per_layer_config = None
    for name, value in _changes(old, kept, layers).items():
        name = getattr(text, "attribute_map", {}).get(name, name)
        computed = getattr(type(text), name, None)
        if isinstance(computed, property) and computed.fset is None:
            continue  # follows from other fields; whether rightly, the comparison tells
        try:
            setattr(text, name, value)
        except (AttributeError, TypeError, ValueError) as error:
            raise UnsupportedModel(
                f"config.{name} of {type(old).__name__} cannot be set to {value!r}: {error}"
            ) from error
    if overrides:
        own = {int(layer): values for layer, values in overrides.items()}
        text.per_layer_config = {i: own[layer] for i, layer in enumerate(kept) if layer in own}
    return new


def _changes(old: Any, kept: tuple[int, ...], layers: int) -> dict[str, Any]:
    """Field to new value, by what the fields of transformers' configurations mean."""
    changes: dict[str, Any] = {name: len(kept) for name, count in layer_counts(old) if count == layers}
    for name, values in _lists(old, PER_LAYER):
        if len(values) == layers:
            changes[name] = type(values)(values[i] for i in kept)
    longest = getattr(old, "max_position_embeddings", None)
    lost = "layer_types" in changes and _windowed(old.layer_types) and not _windowed(changes["layer_types"])
    if lost and longest and isinstance(getattr(old, "sliding_window", None), int):
        # vLLM takes the window of a model whose layers are alike for that of every layer; null is not always accepted
        changes["sliding_window"] = longest
    for name, values in _lists(old, PATTERNS):
        changes[name] = type(values)(values[i % len(values)] for i in kept)
    for name, values in _lists(old, INDEX_LISTS):
        changes[name] = type(values)(i for i, layer in enumerate(kept) if layer in values)
    for name, values in _lists(old, SHARED):
        own = [layer for layer, kind in enumerate(values) if kind != "shared"]
        sources = [max((i for i in own if i <= layer), default=layer) for layer in range(len(values))]
        _check_sources(name, sources, kept)
    for name, values in _lists(old, SOURCES):
        _check_sources(name, values, kept)
        changes[name] = type(values)(kept.index(values[layer]) for layer in kept)
    for name in BOUNDARIES:
        if isinstance(getattr(old, name, None), int):
            changes[name] = sum(layer < getattr(old, name) for layer in kept)
    for name in LAST:
        if isinstance(getattr(old, name, None), int):
            changes[name] = sum(layer >= layers - getattr(old, name) for layer in kept)
    if isinstance(getattr(old, "n_recurrent_layers", None), int):  # between the input and the output layers
        changes["n_recurrent_layers"] = len(kept) - changes["n_input_layers"] - changes["n_output_layers"]
    for name in SCALES:
        if isinstance(getattr(old, name, None), (int, float)):
            changes[name] = getattr(old, name) * math.sqrt(len(kept) / layers)
    for name in PERIODS:
        period, offset = getattr(old, f"{name}_period", None), getattr(old, f"{name}_offset", None)
        if isinstance(period, int) and isinstance(offset, int):
            found = _period([layer % period == offset for layer in kept])
            if found is not None:
                changes |= {f"{name}_period": found[0], f"{name}_offset": found[1]}
    step = getattr(old, "decoder_sparse_step", None)
    if isinstance(step, int) and isinstance(getattr(old, "mlp_only_layers", None), (list, tuple)):
        dense = [i for i, layer in enumerate(kept) if layer in old.mlp_only_layers or (layer + 1) % step]
        changes |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    if isinstance(getattr(old, "attention_types", None), list) and "attention_layers" in changes:
        changes["attention_types"] = [[[kind], 1] for kind in changes["attention_layers"]]  # GPT-Neo's run lengths
    return changes


def _windowed(kinds: Sequence[str]) -> bool:
    return any("sliding" in kind for kind in kinds)


def _keep_visual_targets(config: Any, kept: tuple[int, ...]) -> None:
    """Layers that a vision tower feeds, by their index, must stay; where a config lists them they are renumbered."""
    for part in vars(config).values():
        count = len(getattr(part, "deepstack_visual_indexes", None) or ())
        if kept[:count] != tuple(range(count)):
            raise UnsupportedModel(f"the first {count} layers take what deepstack layers of the vision tower see")
    mapped, spatial = (getattr(config, name, None) for name in ("deepstack_layer_map", "spatial_target_layers"))
    fed = [layer for _, layer in mapped or ()] + list(spatial or ())
    if not set(fed) <= set(kept):
        raise UnsupportedModel(f"layers {sorted(set(fed) - set(kept))} take what layers of the vision tower see")
    if mapped:
        config.deepstack_layer_map = [(seen, kept.index(layer)) for seen, layer in mapped]
    if spatial:
        config.spatial_target_layers = [kept.index(layer) for layer in spatial]


def renumber_modules(quantisation: Any, path: str, kept: tuple[int, ...]) -> None:
    """Names of modules in a quantisation config (which to leave alone, say): of kept layers, by their new numbers."""
    fields = quantisation if isinstance(quantisation, dict) else vars(quantisation)
    number = re.compile(rf"((?:^|\.){re.escape(path.rpartition('.')[2])}\.)(\d+)(?=\.|$)")
    for field, names in fields.items():
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            found = [(name, number.search(name)) for name in names]
            fields[field] = [
                name if match is None else number.sub(rf"\g<1>{kept.index(int(match[2]))}", name)
                for name, match in found
                if match is None or int(match[2]) in kept
            ]


def _check_sources(name: str, sources: Sequence[int], kept: tuple[int, ...]) -> None:
    for layer in kept:
        if sources[layer] not in kept:
            raise UnsupportedModel(
                f"layer {layer} uses what layer {sources[layer]} computes (config.{name}): that one must be kept too"
            )


def _lists(config: Any, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    values = ((name, getattr(config, name, None)) for name in names)
    return ((name, value) for name, value in values if isinstance(value, (list, tuple)) and value)


def _period(chosen: list[bool]) -> tuple[int, int] | None:
    """The smallest period, and its offset, that chooses exactly these of the layers; None if there is none."""
    for period in range(1, len(chosen) + 2):
        for offset in range(period):
            if [i % period == offset for i in range(len(chosen))] == chosen:
                return period, offset
    return None
