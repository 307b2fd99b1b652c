"""The state of an optimizer as one process has it, gathered from shards and divided again.

A checkpoint holds the same file whatever engine wrote it, so that any engine and any number of processes can go on
from it.
"""

from __future__ import annotations

from typing import Any

import torch

from gradpruner.distributed.sharding import is_sharded, whole


def gathered_state(optimizer: Any, *, keep: bool) -> dict[str, Any]:
    """Return the state of an optimizer with whole tensors in host memory.

    This is a collective for sharded ones.

    Args:
        optimizer: a torch optimizer, or one that accelerate has wrapped.
        keep: whether this process needs the result. If not, its tensors are empty.
    """
    state: dict[str, Any] = optimizer.state_dict()

    def gathered(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        tensor = whole(value.detach())
        return tensor.cpu() if keep else torch.empty(0)

    entries = {key: {name: gathered(value) for name, value in entry.items()} for key, entry in state["state"].items()}
    return {**state, "state": entries}


def divided_state(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Return what `gathered_state` gave, divided as the parameters of an optimizer are.

    Args:
        optimizer: the optimizer that the state is for.
        state: the state, with whole tensors.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    place = dict(zip(numbers, parameters, strict=True))
    entries = {
        key: {name: divided(value, place[key]) for name, value in entry.items()}
        for key, entry in state["state"].items()
    }
    return {**state, "state": entries}


def divided(value: Any, like: torch.Tensor) -> Any:
    """Return this process's shard of a whole tensor, as `like` is sharded.

    Anything else is returned as it is.

    Args:
        value: a tensor in host memory, the same in every process.
        like: a parameter. If its shape is another one, for example that of a number of steps, nothing is divided.
    """
    if not isinstance(value, torch.Tensor) or not is_sharded(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    device = sharded.to_local().device
    return distribute_tensor(value.to(device), sharded.device_mesh, sharded.placements, src_data_rank=None)
