"""A checked removal of layers: what will change, and how it is done and undone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from gradpruner.model.decoder import CHECKPOINTED, Decoder
from gradpruner.model.extra_layers import log_counts_set_to_zero


class Attribute(NamedTuple):
    """An attribute that gets another value."""

    owner: Any  # a module, or the generation config
    name: str
    value: Any


class PartPerLayer(NamedTuple):
    """A parameter outside the layers that holds one equal part per layer along one axis."""

    name: str
    axis: int


class ReplacedParameter(NamedTuple):
    """A parameter and the smaller one that took its place.

    Args:
        old: the parameter of the dense model.
        new: the parameter of the smaller model.
        cut: cuts another tensor of the old shape in the same way, such as the optimizer's state.
    """

    old: nn.Parameter
    new: nn.Parameter
    cut: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Surgery:
    """A removal that was checked and is not yet done.

    Args:
        decoder: the model.
        kept: the kept layers, ascending.
        configs: pairs of a config object that the model holds and the one that takes its place.
        attributes: attributes of modules and of the generation config that change.
        parts: parameters outside the layers of which the parts of removed layers are cut out.
        absent: counts of layers in the config that the model never had; they become 0.
    """

    decoder: Decoder
    kept: tuple[int, ...]
    configs: tuple[tuple[Any, Any], ...] = ()
    attributes: tuple[Attribute, ...] = ()
    parts: tuple[PartPerLayer, ...] = ()
    absent: tuple[tuple[Any, str, int], ...] = ()

    def perform(self) -> tuple[Callable[[], None], tuple[ReplacedParameter, ...]]:
        """Cut the list of layers, renumber the kept ones, and swap the config.

        If something fails half way, the model is left as it was.

        Returns:
            A function that undoes all of it, and the parameters outside the layers that were replaced.
        """
        base, layers = self.decoder.base, self.decoder.layers
        undo: list[Attribute] = []

        def assign(owner: Any, name: str, value: Any) -> None:
            undo.append(Attribute(owner, name, getattr(owner, name)))
            setattr(owner, name, value)

        def restore() -> None:
            for owner, name, value in reversed(undo):
                setattr(owner, name, value)

        replaced = []
        replacements = {id(old): new for old, new in self.configs}
        try:
            for module in list(base.modules()):
                for name, value in list(vars(module).items()):
                    if id(value) in replacements:
                        assign(module, name, replacements[id(value)])
            for owner, name, value in self.attributes:
                assign(owner, name, value)
            for path, axis in self.parts:
                owner_path, _, name = path.rpartition(".")
                owner = live_module(base, owner_path)
                cut = functools.partial(_kept_parts, layers=len(layers), kept=self.kept, axis=axis)
                old = getattr(owner, name)
                assign(owner, name, nn.Parameter(cut(old), old.requires_grad))
                replaced.append(ReplacedParameter(old, getattr(owner, name), cut))
            parent_path, _, name = self.decoder.path.rpartition(".")
            assign(base.get_submodule(parent_path), name, nn.ModuleList([layers[i] for i in self.kept]))
            log_counts_set_to_zero(self.absent)
        except BaseException:
            restore()
            raise
        return restore, tuple(replaced)


def _kept_parts(tensor: torch.Tensor, layers: int, kept: tuple[int, ...], axis: int) -> torch.Tensor:
    """Cut the removed layers' parts out of a tensor with one part per layer along `axis`."""
    parts: torch.Tensor = tensor.detach().unflatten(axis, (layers, -1))
    return parts.index_select(axis, torch.tensor(kept, device=tensor.device)).flatten(axis, axis + 1)


def live_module(root: nn.Module, path: str) -> nn.Module:
    """Find a module by its path in the plain model, through the adapters around it.

    Args:
        root: the base model or one of its layers.
        path: dotted path below `root`, "" for `root` itself.

    Returns:
        The module that holds the weights.
    """
    module = root
    for part in path.split(".") if path else []:
        while not hasattr(module, part) and hasattr(module, "base_layer"):  # adapters may be nested
            module = module.base_layer  # type: ignore[assignment]
        module = getattr(module, part)
    module = getattr(module, CHECKPOINTED, module)
    while hasattr(module, "base_layer"):
        module = module.base_layer  # type: ignore[assignment]
    return module
