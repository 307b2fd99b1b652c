"""Find the list of decoder layers in a model.

The structure and the config decide, never the name of the model.
"""

from __future__ import annotations

from torch import nn

from gradpruner.errors import InvalidArgument, UnsupportedModel
from gradpruner.model.config import layer_counts, nearest_config, text_config
from gradpruner.model.linears import is_linear


def find_layers(base: nn.Module, layers: str | nn.ModuleList | None) -> str:
    """Return the path of a model's list of decoder layers.

    Args:
        base: the model without wrappers.
        layers: the path of the list, or the list itself. None to find it by the model's config.

    Raises:
        InvalidArgument: `layers` is no list of this model.
        UnsupportedModel: the config does not lead to exactly one list.
    """
    lists = {name: module for name, module in base.named_modules() if isinstance(module, nn.ModuleList) and len(module)}
    if isinstance(layers, nn.ModuleList):
        return _by_object(layers, lists)
    if layers is not None:
        return _by_path(layers, lists)
    return _by_config(base, lists)


def _by_object(layers: nn.ModuleList, lists: dict[str, nn.ModuleList]) -> str:
    for path, module in lists.items():
        if module is layers:
            return path
    raise InvalidArgument("layers is a ModuleList that is not part of the model")


def _by_path(layers: str, lists: dict[str, nn.ModuleList]) -> str:
    if layers not in lists:
        raise InvalidArgument(f"layers = {layers!r} is no ModuleList of this model; accepted are {sorted(lists)}")
    return layers


def _by_config(base: nn.Module, lists: dict[str, nn.ModuleList]) -> str:
    """The only list of the text decoder that is as long as the config says."""
    counts = [count for _, count in layer_counts(base.config)] if hasattr(base, "config") else []
    if not counts:
        raise UnsupportedModel(
            f"{type(base).__name__} has no config with num_hidden_layers: name its ModuleList of decoder layers "
            f"with layers=...; it has {sorted(lists)}"
        )
    problem = f"no list of {counts[0]} decoder layers"
    for count in dict.fromkeys(counts):  # the first of several counts that fits decides
        candidates = _lists_of_length(base, lists, count)
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            problem = f"several lists of {count} layers, {candidates}"
            break
    raise UnsupportedModel(f"{type(base).__name__} has {problem}: name it with layers=...; lists: {sorted(lists)}")


def _lists_of_length(base: nn.Module, lists: dict[str, nn.ModuleList], count: int) -> list[str]:
    """The outermost lists of so many layers with linears, if possible of the text decoder."""
    paths = [path for path, module in lists.items() if len(module) == count and _holds_linears(module)]
    outermost = [p for p in paths if not any(p.startswith(f"{other}.") for other in paths if other != p)]
    return _of_text_decoder(base, outermost)


def _of_text_decoder(base: nn.Module, paths: list[str]) -> list[str]:
    """Leave out the lists of a vision tower or an encoder, as far as they can be recognised."""
    text = type(text_config(base.config))
    inside: set[int] = set()
    if len(paths) > 1 and hasattr(base, "get_decoder"):
        inside = {id(module) for module in base.get_decoder().modules()}  # type: ignore[operator]
    for belongs in (
        lambda path: type(nearest_config(base, path)) is text,
        lambda path: id(base.get_submodule(path)) in inside,
        lambda path: any("decoder" in part for part in path.split(".")),
    ):
        if len(paths) > 1:
            paths = [path for path in paths if belongs(path)] or paths
    return paths


def _holds_linears(layers: nn.ModuleList) -> bool:
    return all(any(is_linear(module) for module in layer.modules()) for layer in layers)
