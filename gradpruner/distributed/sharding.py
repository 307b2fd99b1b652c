"""Which part of a sharded tensor this process holds, and the whole of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradpruner.errors import UnsupportedModel


def is_sharded(tensor: Any) -> bool:
    """Whether this is a DTensor, told without importing them."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, gathered from all processes if it is sharded (then a collective)."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """This process's part: of a DTensor its shard, not copied."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Layout:
    """How a DTensor is spread over processes, without its values."""

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size

    @classmethod
    def of(cls, tensor: Any) -> Layout:
        """The layout of a DTensor."""
        return cls(tensor.device_mesh, tuple(tensor.placements), tensor.shape)

    def whole(self, part: Tensor) -> Tensor:
        """The tensor of which every process holds its part, in host memory: a collective."""
        from torch.distributed.tensor import DTensor

        part = part.to(self.mesh.device_type)
        stride = torch.empty(self.shape, device="meta").stride()
        spread = DTensor.from_local(part, self.mesh, self.placements, run_check=False, shape=self.shape, stride=stride)
        return spread.full_tensor().cpu()


def rows_of(tensor: Any) -> tuple[int, int] | None:
    """First row and number of rows that this process has of a tensor sharded as FSDP2 does; None if it has all.

    Raises UnsupportedModel where it is sharded in another way.
    """
    dimension = _sharded_dimension(tensor) if is_sharded(tensor) else None
    if dimension is None:
        return None
    parts = tensor.device_mesh.size(dimension)
    step = -(-int(tensor.shape[0]) // parts)  # as torch.chunk
    first = min(int(tensor.shape[0]), step * tensor.device_mesh.get_local_rank(dimension))
    return first, int(local(tensor).shape[0])


def shard_group(tensor: Any) -> Any:
    """The process group over which a tensor of which `rows_of` gives rows is cut."""
    return tensor.device_mesh.get_group(_sharded_dimension(tensor))


def _sharded_dimension(tensor: Any) -> int | None:
    cut = [i for i, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if len(cut) > 1 or (cut and not tensor.placements[cut[0]].is_shard(0)):
        raise UnsupportedModel(
            f"a weight is distributed as {tensor.placements}; accepted are FSDP2's shards of rows, with or without "
            "replicas"
        )
    return cut[0] if cut else None
