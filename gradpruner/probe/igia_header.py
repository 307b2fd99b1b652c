"""The header of an igia file: its fields and tensors are checked before they are used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from gradpruner.errors import CheckpointError
from gradpruner.model.decoder import Weight
from gradpruner.storage.tensor_files import TensorInFile

LARGEST = 2**63 - 1  # number of parameters; a damaged file may hold more


def checked_fields(path: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """Check the header, and make from it all fields of an `Igia` but the tensors.

    Args:
        path: the file, for messages.
        header: the header, as JSON holds it.

    Returns:
        Keyword arguments of `Igia`.

    Raises:
        CheckpointError: a field is missing or not what `Igia.save` writes.
    """

    def field(name: str, accepted: Callable[[Any], bool], default: Any = None) -> Any:
        value = header.get(name, default)
        if not accepted(value):
            raise CheckpointError(f"{path} is not an igia file, or is corrupted: {name} = {str(value)[:80]}")
        return value

    layers = field("layers", lambda n: type(n) is int and n > 0)

    def is_weight(entry: Any) -> bool:
        return (
            isinstance(entry, list)
            and [type(part) for part in entry] == [int, str, list, bool]
            and 0 <= entry[0] < layers
            and all(map(_is_count, entry[2]))
        )

    def one_each(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
        return lambda entries: isinstance(entries, list) and len(entries) == layers and all(map(kind, entries))

    weights = field("weights", lambda entries: isinstance(entries, list) and all(map(is_weight, entries)))
    shared = field("shared_parameters", lambda entries: entries is None or _are_shared(entries, layers))
    adapters = field("adapters", lambda names: isinstance(names, list) and all(isinstance(n, str) for n in names), [])
    if len(adapters) not in (0, len(weights)):
        raise CheckpointError(f"{path} is corrupted: {len(adapters)} adapters of {len(weights)} weights")
    field("exponents", _are_exponents, {})
    return {
        "model": field("model", lambda text: isinstance(text, str)),
        "estimator": field("estimator", lambda text: isinstance(text, str)),
        "layers": layers,
        "weights": tuple(Weight(j, name, tuple(shape), transposed) for j, name, shape, transposed in weights),
        "structures": tuple(field("structures", one_each(lambda text: isinstance(text, str)))),
        "layer_parameters": tuple(field("layer_parameters", one_each(_is_count))),
        "shared_parameters": None if shared is None else tuple((tuple(own), count) for own, count in shared),
        "total_parameters": field("total_parameters", _is_count),
        "skipped": field("skipped", _is_count),
        "adapters": tuple(adapters),
    }


def check_tensors(path: Path, weights: tuple[Weight, ...], stored: Mapping[str, TensorInFile]) -> None:
    """Check that every tensor is the norms or belongs to the importance of one of the weights.

    Args:
        path: the file, for messages.
        weights: the watched weights, from the header.
        stored: the tensors in the file, by name.

    Raises:
        CheckpointError: a tensor is missing, has another shape or dtype, or belongs to no weight.
    """
    if len({(weight.layer, weight.name) for weight in weights}) != len(weights):
        raise CheckpointError(f"{path} is corrupted: it names a weight twice")
    norms = stored.get("square_norms")
    if norms is None or norms.dtype != torch.float64 or norms.shape[1:] != (len(weights),):
        raise CheckpointError(f"{path} is corrupted: expected square_norms, float64, one column for each weight")
    known = {"square_norms"}
    for weight in weights:
        f, a, b = (stored.get(f"{weight.layer}/{weight.name}/{part}") for part in ("f", "a", "b"))
        if f is not None:
            known.add(f.name)
            fits = (f.dtype, f.shape, a, b) == (torch.float32, weight.shape, None, None)
        elif a is not None and b is not None:
            known |= {a.name, b.name}
            fits = len(a.shape) == len(b.shape) == 3 and (a.shape[0], a.shape[1]) == (b.shape[0], b.shape[2])
            fits = fits and (b.shape[1], a.shape[2]) == weight.shape and a.dtype == b.dtype
        else:
            fits = (a, b) == (None, None)
        if not fits:
            raise CheckpointError(f"{path} is corrupted: layer {weight.layer} {weight.name} has another importance")
    unknown = sorted(stored.keys() - known)
    if unknown:
        raise CheckpointError(f"{path} is corrupted: {unknown[0]!r} belongs to none of its weights")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def _are_shared(entries: Any, layers: int) -> bool:
    return isinstance(entries, list) and all(
        isinstance(entry, list)
        and len(entry) == 2
        and isinstance(entry[0], list)
        and all(type(layer) is int and 0 <= layer < layers for layer in entry[0])
        and _is_count(entry[1])
        for entry in entries
    )


def _are_exponents(entries: Any) -> bool:
    return isinstance(entries, dict) and all(
        isinstance(pair, list) and [type(part) for part in pair] == [int, int] for pair in entries.values()
    )
