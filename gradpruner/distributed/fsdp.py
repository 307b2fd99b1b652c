"""What FSDP2 needs: its shards again after a forward pass, its groups without removed layers."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from gradpruner.errors import UnsupportedModel


def refuse_flat(model: nn.Module) -> None:
    """Raises UnsupportedModel for FSDP1, which hides each weight in a part of one flat parameter."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FullyShardedDataParallel", ())
    if fsdp is not None and any(isinstance(module, kind) for module in model.modules()):
        raise UnsupportedModel(
            "the model is wrapped in FullyShardedDataParallel (FSDP1), whose weights and gradients are flat pieces; "
            "accepted are fully_shard (FSDP2; fsdp_version: 2 in accelerate), DistributedDataParallel and DeepSpeed"
        )


def is_fsdp(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to this module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported, not used
    return fsdp is not None and isinstance(module, getattr(fsdp, "FSDPModule", ()))


def reshard(model: nn.Module) -> None:
    """Every module's parameters are shards again; a forward without a backward leaves the root's gathered."""
    for module in model.modules():
        if is_fsdp(module):
            module.reshard()  # type: ignore[operator]


def release_shards(root: nn.Module, removed: list[nn.Module]) -> None:
    """Let go of modules that are no longer part of an FSDP root, so that their memory is free again.

    torch finds the sharded modules at the root's first forward and keeps their states for good.
    """
    gone_modules = {id(module) for layer in removed for module in layer.modules()}

    def stays(state: Any) -> bool:
        return any(id(module) not in gone_modules for module in state._modules)

    states = root._get_fsdp_state()._state_ctx.all_states  # type: ignore[operator]
    states[:] = [state for state in states if stays(state)]
    for state in states:
        for neighbours in (state._states_to_forward_prefetch, state._states_to_backward_prefetch):
            neighbours[:] = [other for other in neighbours if stays(other)]


@contextlib.contextmanager
def resharding(model: nn.Module) -> Iterator[None]:
    """FSDP2's shards again outside: a forward without a backward leaves the root's parameters gathered."""
    try:
        yield
    finally:
        reshard(model)
