"""Several processes: which of them work together, what one says to the others, and tensors sharded over them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from gradpruner.errors import GradPrunerError, InvalidArgument, ProbeError, UnsupportedModel

T = TypeVar("T")


@dataclass(frozen=True)
class Peers:
    """The processes that train one model together, as one of them (`rank` of `size`) sees them.

    Every method but `keeps` is a collective: all of them call it, in the same order. All raise ProbeError where
    another process has gone.
    """

    group: Any
    rank: int
    size: int

    def keeps(self, layer: int) -> bool:
        """Whether this process stores what is kept of a layer: each layer has one that does."""
        return layer % self.size == self.rank

    def gather(self, what: T) -> list[T]:
        """What every process gave, by rank. For small things: they are pickled."""
        found: list[Any] = [None] * self.size
        with _answering(self.group):
            distributed.all_gather_object(found, what, group=self.group)
        return found

    def broadcast(self, tensor: Tensor | None, like: Tensor, source: int) -> Tensor:
        """The tensor of process `source`, in host memory everywhere; `like` has its shape and dtype."""
        device = device_of(self.group)
        # as bytes: not every backend moves every dtype
        flat = torch.empty(like.numel() * like.element_size(), dtype=torch.uint8, device=device)
        if tensor is not None:
            flat.copy_(tensor.contiguous().view(-1).view(torch.uint8))
        with _answering(self.group):
            distributed.broadcast(flat, group=self.group, group_src=source)
        return flat.cpu().view(like.dtype).view(like.shape)

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any process."""
        return bool(summed(torch.tensor([int(flag)]), self.group) > 0)


def peers_of(group: Any = None) -> Peers | None:
    """The processes of a group, None where there is but one.

    group: a ProcessGroup; None for the default group, if there is one; False for this process alone.
    Raises InvalidArgument.
    """
    if group is False or not distributed.is_available():
        return None
    if group is not None and not isinstance(group, distributed.ProcessGroup):
        raise InvalidArgument(f"group = {group!r}; accepted are a torch ProcessGroup, None and False")
    if not distributed.is_initialized():
        return None
    rank, size = distributed.get_rank(group), distributed.get_world_size(group)
    if rank < 0:
        raise InvalidArgument("group: this process is not part of it")
    return Peers(group, rank, size) if size > 1 else None


@contextlib.contextmanager
def together(peers: Peers | None) -> Iterator[None]:
    """An error inside is raised on every process at the end, so that none waits for one that failed.

    Nothing inside may be a collective, since a process that fails leaves early.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        if peers is None:
            raise
        failed = error
    if peers is None:
        return
    kind = type(failed) if isinstance(failed, GradPrunerError) else GradPrunerError
    answers = peers.gather(None if failed is None else (kind, str(failed)))
    if failed is not None:
        raise failed
    for rank, answer in enumerate(answers):
        if answer is not None:
            raise answer[0](f"process {rank}: {answer[1]}")


def device_of(group: Any) -> torch.device:
    """Where a tensor has to be to travel in this group: the host if its backend can, else the accelerator."""
    if "cpu:" in str(distributed.get_backend_config(group)):
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def summed(values: Tensor, group: Any) -> Tensor:
    """The sum of each process's values, in host memory. Raises ProbeError where another process has gone."""
    total = values.to(device_of(group), copy=True)
    with _answering(group):
        distributed.all_reduce(total, group=group)
    return total.cpu()


@contextlib.contextmanager
def _answering(group: Any) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo raises it bare, NCCL as DistBackendError
        raise gone(error, group) from error


def gone(error: RuntimeError, group: Any) -> ProbeError:
    """What a failed collective means, said plainly."""
    return ProbeError(
        f"process {distributed.get_rank(group)} waited in vain for another process of its group, which has died, has "
        f"failed, or does something else meanwhile; torch says: {str(error).splitlines()[0]}"
    )


def is_lost(error: BaseException) -> bool:
    """Whether an error is torch's for a process of the group that is gone."""
    if isinstance(error, getattr(distributed, "DistError", ())):
        return True
    signs = ("closed by peer", "Connection reset", "gloo", "NCCL", "Timed out waiting")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


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


def forget(root: nn.Module, removed: list[nn.Module]) -> None:
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
