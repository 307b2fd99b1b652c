"""FSDP2: shard parameters again after a forward pass, and forget removed layers."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

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
