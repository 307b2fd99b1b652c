"""Processes that train one model together: who they are, what they exchange, how they fail."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from gradpruner.errors import GradPrunerError, InvalidArgument, ProbeError

T = TypeVar("T")
_alone: ContextVar[bool] = ContextVar("alone", default=False)


@dataclass(frozen=True)
class Peers:
    """The processes that train one model together, as seen by one of them.

    Every method but `keeps` is a collective: all processes call it, in the same order. A collective raises ProbeError
    if another process is lost.

    Args:
        group: their torch ProcessGroup, or None for the default group.
        rank: the number of this process, from 0.
        size: the number of processes.
    """

    group: Any
    rank: int
    size: int

    def keeps(self, layer: int) -> bool:
        """Whether this process owns the data of a layer. Every layer has exactly one owner."""
        return layer % self.size == self.rank

    def gather(self, item: T) -> list[T]:
        """Return the items of all processes, by rank. They are pickled, so they should be small."""
        items: list[Any] = [None] * self.size
        with _answering(self.group):
            distributed.all_gather_object(items, item, group=self.group)
        return items

    def broadcast(self, tensor: Tensor | None, like: Tensor, source: int) -> Tensor:
        """Send a tensor from one process to all others.

        Args:
            tensor: what process `source` sends. None on the others.
            like: a tensor of the same shape and dtype, on every process.
            source: the rank of the sender.

        Returns:
            The tensor, in host memory.
        """
        device = device_of(self.group)
        # as bytes: not every backend moves every dtype
        flat = torch.empty(like.numel() * like.element_size(), dtype=torch.uint8, device=device)
        if tensor is not None:
            flat.copy_(tensor.contiguous().view(-1).view(torch.uint8))
        with _answering(self.group):
            distributed.broadcast(flat, group=self.group, group_src=source)
        return flat.cpu().view(like.dtype).view(like.shape)

    def any(self, flag: bool) -> bool:
        """Whether the flag is true on any process."""
        return bool(summed(torch.tensor([int(flag)]), self.group) > 0)


def peers_of(group: Any = None) -> Peers | None:
    """Return the processes of a group, or None if there is only this one.

    Args:
        group: a torch ProcessGroup. None takes the default group, if there is one, except inside `alone`. False takes
            this process alone.

    Raises:
        InvalidArgument: `group` is something else, or this process is not part of it.
    """
    if group is False or not distributed.is_available() or (group is None and _alone.get()):
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
    """Raise an error of one process on every process, so that none waits for one that failed.

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


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works as if it were the only one: `peers_of` finds no others."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def is_first() -> bool:
    """Whether this process is the one that writes: the first of all, or the only one."""
    peers = peers_of()
    return peers is None or peers.rank == 0


def first(work: Callable[[], T]) -> T:
    """Do some work in the first process alone, and return its result in all of them.

    The other processes wait. What a folder holds is decided in this way, so that all processes decide the same.

    Args:
        work: may read and write files, and returns something small that can be pickled.

    Raises:
        GradPrunerError: of the type and with the message that the first process raises, in every process.
    """
    peers = peers_of()
    if peers is None:
        return work()
    failed: Exception | None = None
    answer: list[Any] = [None]
    if peers.rank == 0:
        try:
            with alone():
                answer = [(True, work())]
        except Exception as error:
            failed = error
            kind = type(error) if isinstance(error, GradPrunerError) else GradPrunerError
            answer = [(False, (kind, str(error) or type(error).__name__))]
    with _answering(peers.group):
        distributed.broadcast_object_list(answer, group=peers.group, group_src=0)
    if failed is not None:
        raise failed
    done, result = answer[0]
    if not done:
        raise result[0](result[1])
    return result


def wait_for_all() -> None:
    """Wait until every process has come here. Raises ProbeError if one is lost."""
    peers = peers_of()
    if peers is not None:
        peers.any(False)


def device_of(group: Any) -> torch.device:
    """Return the device that tensors must be on to be exchanged in a group.

    It is the host if the backend of the group supports that, else the accelerator.
    """
    if "cpu:" in str(distributed.get_backend_config(group)):
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def summed(values: Tensor, group: Any) -> Tensor:
    """Sum tensors over all processes.

    Args:
        values: this process's values, of the same shape and dtype everywhere.
        group: the torch ProcessGroup, or None for the default group.

    Returns:
        The sum, in host memory.

    Raises:
        ProbeError: another process is lost.
    """
    total = values.to(device_of(group), copy=True)
    with _answering(group):
        distributed.all_reduce(total, group=group)
    return total.cpu()


@contextlib.contextmanager
def _answering(group: Any) -> Iterator[None]:
    """Inside, a failed collective becomes a ProbeError."""
    try:
        yield
    except RuntimeError as error:  # gloo raises it bare, NCCL as DistBackendError
        raise lost_process(error, group) from error


def lost_process(error: RuntimeError, group: Any) -> ProbeError:
    """Return the error that says in plain words what a failed collective means.

    Args:
        error: what torch raised.
        group: the torch ProcessGroup, or None for the default group.
    """
    return ProbeError(
        f"process {distributed.get_rank(group)} lost contact with another process of its group: it died, failed, or "
        f"called a different collective; torch says: {str(error).splitlines()[0]}"
    )


def is_lost(error: BaseException) -> bool:
    """Whether torch raised an error because another process of the group is lost."""
    if isinstance(error, getattr(distributed, "DistError", ())):
        return True
    signs = ("closed by peer", "Connection reset", "gloo", "NCCL", "Timed out waiting")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
