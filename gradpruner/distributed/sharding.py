"""Sharded tensors: the part that this process holds, and the whole tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradpruner.errors import UnsupportedModel


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor. The class is not imported to find out."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor. If it is sharded, it is gathered, which is a collective."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, without a copy: the shard if it is sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Layout:
    """How a DTensor is spread over processes, without its values.

    It can gather another tensor that is spread in the same way, such as an importance.

    Args:
        mesh: the DeviceMesh of the processes.
        placements: for each dimension of the mesh, whether and how the tensor is sharded over it.
        shape: the shape of the whole tensor.
    """

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size

    @classmethod
    def of(cls, tensor: Any) -> Layout:
        """Return the layout of a DTensor."""
        return cls(tensor.device_mesh, tuple(tensor.placements), tensor.shape)

    def gather(self, shard: Tensor) -> Tensor:
        """Return the whole tensor, in host memory. This is a collective.

        Args:
            shard: this process's part of it.
        """
        from torch.distributed.tensor import DTensor

        sharded = DTensor.from_local(
            shard.to(self.mesh.device_type),
            self.mesh,
            self.placements,
            run_check=False,
            # given, since rows need not be spread evenly
            shape=self.shape,
            stride=torch.empty(self.shape, device="meta").stride(),
        )
        return sharded.full_tensor().cpu()


def rows_of(tensor: Any) -> tuple[int, int] | None:
    """Return which rows of a sharded tensor this process has: the first row and their number.

    The answer is None if this process has all rows.

    Raises:
        UnsupportedModel: the tensor is sharded in another way than FSDP2's.
    """
    dimension = _sharded_dimension(tensor) if is_sharded(tensor) else None
    if dimension is None:
        return None
    parts = tensor.device_mesh.size(dimension)
    step = -(-int(tensor.shape[0]) // parts)  # rounded up, as torch.chunk does
    first = min(int(tensor.shape[0]), step * tensor.device_mesh.get_local_rank(dimension))
    return first, int(local(tensor).shape[0])


def shard_group(tensor: Any) -> Any:
    """Return the process group over which a tensor is sharded. `rows_of` must give rows for it."""
    return tensor.device_mesh.get_group(_sharded_dimension(tensor))


def _sharded_dimension(tensor: Any) -> int | None:
    """The dimension of the mesh over which rows are sharded, None if they are replicated."""
    sharded = [i for i, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if len(sharded) > 1 or (sharded and not tensor.placements[sharded[0]].is_shard(0)):
        raise UnsupportedModel(
            f"a weight is distributed as {tensor.placements}; accepted are FSDP2's shards of rows, with or without "
            "replicas"
        )
    return sharded[0] if sharded else None
