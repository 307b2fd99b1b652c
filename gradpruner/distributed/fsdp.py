"""FSDP2: shard parameters again after a forward pass, and forget removed layers."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from gradpruner.distributed.sharding import whole
from gradpruner.errors import UnsupportedModel


def refuse_flat(model: nn.Module) -> None:
    """Raise UnsupportedModel for FSDP1, which hides weights in one flat parameter."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FullyShardedDataParallel", ())
    if fsdp is not None and any(isinstance(module, kind) for module in model.modules()):
        raise UnsupportedModel(
            "the model is wrapped in FullyShardedDataParallel (FSDP1), whose weights and gradients are flat pieces; "
            "accepted are fully_shard (FSDP2; fsdp_version: 2 in accelerate), DistributedDataParallel and DeepSpeed"
        )


def is_fsdp(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to a module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # a module that was never imported is not in use
    return fsdp is not None and isinstance(module, getattr(fsdp, "FSDPModule", ()))


def reshard(model: nn.Module) -> None:
    """Turn the parameters of every module into shards again.

    A forward pass without a backward pass leaves the parameters of the root gathered.
    """
    for module in model.modules():
        if is_fsdp(module):
            module.reshard()  # type: ignore[operator]


def release_shards(root: nn.Module, removed: list[nn.Module]) -> None:
    """Make an FSDP root forget removed modules, so that their memory becomes free.

    torch lists the sharded modules at the first forward of the root, and never changes the list.

    Args:
        root: the outermost module that `fully_shard` was applied to.
        removed: modules that are no longer part of it.
    """
    removed_ids = {id(module) for layer in removed for module in layer.modules()}

    def stays(state: Any) -> bool:
        return any(id(module) not in removed_ids for module in state._modules)

    states = root._get_fsdp_state()._state_ctx.all_states  # type: ignore[operator]
    states[:] = [state for state in states if stays(state)]
    for state in states:
        for neighbours in (state._states_to_forward_prefetch, state._states_to_backward_prefetch):
            neighbours[:] = [other for other in neighbours if stays(other)]


@contextlib.contextmanager
def resharding(model: nn.Module) -> Iterator[None]:
    """Afterwards, the parameters of a model are shards again. See `reshard`."""
    try:
        yield
    finally:
        reshard(model)


def twin(model: nn.Module) -> nn.Module:
    """Return a copy of a model's modules, which share the weights of the model.

    The copy can be sharded. Sharding replaces the weights of the modules that it is applied to. The model itself stays
    as it is.
    """
    weights = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(weight): weight for weight in weights})


def take_back(model: nn.Module, sharded: nn.Module) -> None:
    """Give a model the weights that its sharded twin has trained.

    This is a collective, one weight at a time.

    Args:
        model: what `twin` was called with.
        sharded: the twin.
    """
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    reshard(sharded)
    with torch.no_grad():
        for name, weight in (*sharded.named_parameters(), *sharded.named_buffers()):
            if weight.requires_grad or not isinstance(weight, nn.Parameter):
                weights[name].copy_(whole(weight.detach()))
