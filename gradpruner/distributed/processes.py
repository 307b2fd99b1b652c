"""Several processes: which of them work together, what one says to the others, and tensors sharded over them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from gradpruner.errors import GradPrunerError, InvalidArgument, ProbeError

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
