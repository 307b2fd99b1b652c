"""Adapt an optimizer to a model that lost layers.

The optimizer stays the same object, because its scheduler, its hooks and its options belong to that object.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradpruner.errors import InvalidArgument
from gradpruner.model.decoder import base_name

logger = logging.getLogger(__name__)


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer inside accelerate's wrapper. Any other is returned as it is."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def rebuild_optimizer(optimizer: Any, model: nn.Module) -> Any:
    """Make an optimizer hold the parameters of the smaller model.

    Parameters that are still in the model and trainable keep their group, their name and their state. New adapters
    join the first group that held parameters before, and begin without state. If the call raises, nothing is changed.

    Args:
        optimizer: torch's or accelerate's. It is changed in place, so its scheduler and its hooks stay valid.
        model: what `apply` returned, with new adapters around it if it gets some.

    Returns:
        The same object.

    Raises:
        InvalidArgument: `optimizer` is not an optimizer; or no parameter trains; or base weights train that the
            optimizer has not held, so that nobody chose their learning rate (as after adapters="keep"); or new adapters
            could join several groups with different options; or the optimizer keeps parameters outside of its groups,
            as LBFGS does.

    Example:
        model = gradpruner.apply(model, plan, patches=patches)
        optimizer = gradpruner.rebuild_optimizer(optimizer, get_peft_model(model, lora_config))
    """
    inner = unwrapped(optimizer)
    check_optimizer(inner)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise InvalidArgument("model has no trainable parameter; expected at least one for an optimizer")
    held = {id(p) for p in _parameters(inner)}
    new = {name: p for name, p in trainable.items() if id(p) not in held}
    others = [name for name in new if base_name(name) is not None]
    if others:
        raise InvalidArgument(
            f"model has {len(others)} trainable base weights that the optimizer has not held, {others[0]} the first: "
            "they would train with options that were not chosen for them. Expected new adapters around the model, or "
            "frozen weights (requires_grad_(False)), or a new optimizer with a new scheduler; `cut` instead of `apply` "
            "keeps adapters and optimizer as they are"
        )
    group = _group_of_new(inner) if new else {}
    alive = {id(p) for p in trainable.values()}
    drop_state(inner, {id(p) for p in _parameters(inner)} - alive)
    if new:
        group["params"] += new.values()
        if "param_names" in group:
            group["param_names"] += new
    return optimizer


def check_optimizer(optimizer: Any) -> None:
    """Raise InvalidArgument if an optimizer keeps parameters outside of its groups."""
    if not hasattr(optimizer, "param_groups"):
        raise InvalidArgument(f"optimizer is a {type(optimizer).__name__}; expected a torch.optim.Optimizer")
    for name, value in vars(optimizer).items():
        if name not in ("param_groups", "state") and any(isinstance(p, nn.Parameter) for p in _inside(value)):
            raise InvalidArgument(
                f"optimizer {type(optimizer).__name__} keeps parameters in its attribute {name!r} too, and some "
                "of them would no longer be in the model: expected one that keeps them in its param_groups alone. Make "
                "a new optimizer, and a new scheduler, for the smaller model"
            )


def drop_state(optimizer: Any, gone: Collection[int], fresh: Collection[int] = ()) -> None:
    """Take parameters out of the groups of an optimizer, and their state with them.

    Args:
        optimizer: a torch optimizer. It is changed in place.
        gone: ids of the parameters that are taken out.
        fresh: ids of parameters that stay but lose their state, because they start again.
    """
    places = dict(_places(optimizer))
    for group in optimizer.param_groups:
        kept = [i for i, p in enumerate(group["params"]) if id(p) not in gone]
        for name in ("params", "param_names"):
            if name in group:
                group[name][:] = [group[name][i] for i in kept]
    for parameter in list(optimizer.state):
        if id(parameter) in gone or id(parameter) in fresh:
            del optimizer.state[parameter]
    _move_overrides(optimizer, places, gone)


def replace(optimizer: Any, old: nn.Parameter, new: nn.Parameter, part: Callable[[Tensor], Tensor]) -> None:
    """Exchange a parameter for one that holds a part of its entries.

    The new one gets the same part of the state.

    Args:
        optimizer: a torch optimizer. It is changed in place.
        old: the parameter that it holds.
        new: the smaller one.
        part: takes a tensor in the old shape, and returns the part that is kept.
    """
    for group in optimizer.param_groups:
        group["params"][:] = [new if p is old else p for p in group["params"]]
    state: Mapping[str, Any] = optimizer.state.pop(old, {})
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.numel() > 1}
    if any(value.shape != old.shape for value in tensors.values()):  # 8-bit states are in blocks of another shape
        logger.warning(
            f"{type(optimizer).__name__} starts without state for one parameter of shape {tuple(new.shape)}: its state "
            "is not in the shape of the parameter, so the part of the removed layers cannot be taken out"
        )
    elif state:
        optimizer.state[new] = {**state, **{name: part(value) for name, value in tensors.items()}}


def _parameters(optimizer: Any) -> Iterator[nn.Parameter]:
    return (p for group in optimizer.param_groups for p in group["params"])


def _group_of_new(optimizer: Any) -> dict[str, Any]:
    """Return the group that new parameters join. Raise InvalidArgument where that is not clear."""
    used = [group for group in optimizer.param_groups if group["params"]] or optimizer.param_groups
    for group in used[1:]:
        differing = [name for name in group if name not in ("params", "param_names") and group[name] != used[0][name]]
        if differing:
            raise InvalidArgument(
                f"optimizer has groups with a different {differing[0]} ({used[0][differing[0]]} and "
                f"{group[differing[0]]}): which of them new adapters belong to cannot be told. Expected one group, or "
                "groups with the same options; or make a new optimizer and a new scheduler, or use `cut`, which keeps "
                "the adapters"
            )
    first: dict[str, Any] = used[0]
    return first


def _inside(value: Any) -> Iterator[Any]:
    """Yield a value, and what is in it if it is a container."""
    yield value
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _inside(item)


def _places(optimizer: Any) -> Iterable[tuple[tuple[int, int], int]]:
    """Yield group and position of each parameter, and its id."""
    return (((g, i), id(p)) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"]))


def _move_overrides(optimizer: Any, before: Mapping[tuple[int, int], int], gone: Collection[int]) -> None:
    """Move the options that bitsandbytes has for single parameters to their new positions.

    Its GlobalOptimManager finds them by group and position.
    """
    manager = getattr(optimizer, "mng", None)
    if manager is None or not hasattr(manager, "index2config"):
        return
    own = {
        parameter: manager.index2config.pop(place)
        for place, parameter in before.items()
        if place in manager.index2config
    }
    for place, parameter in _places(optimizer):
        if parameter in own:
            manager.index2config[place] = own[parameter]
    for parameter in gone:  # a later parameter may get the same id
        manager.pid2config.pop(parameter, None)
