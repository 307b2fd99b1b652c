"""Check that processes which work together were started alike, and see the same folder."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradpruner.distributed.processes import Peers, first, peers_of
from gradpruner.errors import InvalidArgument

PATIENCE = 60.0  # seconds until a new file is seen on other machines: a network file system may remember its absence
POLL = 0.2


def agree(what: str, content: Any) -> None:
    """Check that something is the same in all processes.

    Args:
        what: its name, for the error.
        content: what JSON can hold.

    Raises:
        InvalidArgument: it differs. The message names the processes.
    """
    peers = peers_of()
    if peers is None:
        return
    answers = peers.gather((socket.gethostname(), json.dumps(content, sort_keys=True, default=str)))
    others = [f"process {rank} on {host}" for rank, (host, other) in enumerate(answers) if other != answers[0][1]]
    if others:
        raise InvalidArgument(
            f"{what} of {', '.join(others)} is another than that of process 0 on {answers[0][0]}; expected the same "
            "command, model and data in every process"
        )


def need_shared(folder: Path) -> None:
    """Check that all processes see one and the same folder. It is made if it does not exist.

    Args:
        folder: a folder that the first process will write to and the others read.

    Raises:
        InvalidArgument: another machine does not see what the first process writes.
    """
    peers = peers_of()
    if peers is None:
        return

    def write() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        name = f".gradpruner-shared-{secrets.token_hex(6)}"
        (folder / name).touch()
        return name

    name = first(write)
    try:
        seen = peers.gather((socket.gethostname(), _appears(folder / name, peers)))
    finally:
        if peers.rank == 0:
            (folder / name).unlink(missing_ok=True)
    blind = sorted({host for host, sees in seen if not sees})
    if blind:
        raise InvalidArgument(
            f"folder {os.fspath(folder)!r} on {', '.join(blind)} is not the one that process 0 on {seen[0][0]} writes; "
            "expected a folder that all machines share"
        )


def _appears(file: Path, peers: Peers) -> bool:
    """Return whether a file is seen, at once or a little later."""
    end = time.monotonic() + (PATIENCE if peers.rank else 0.0)
    while not file.parent.is_dir() or file.name not in os.listdir(file.parent):
        if time.monotonic() >= end:
            return False
        time.sleep(POLL)
    return True


def take_weights_of_first(model: nn.Module) -> None:
    """Give a model the weights that it has in the first process, bit for bit.

    Every process made the model for itself. Another processor may round otherwise.

    Args:
        model: a model that is not sharded, with the same parameters in every process.
    """
    peers = peers_of()
    if peers is None:
        return
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    agree("the model after its cut", [[name, list(tensor.shape)] for name, tensor in tensors.items()])
    with torch.no_grad():
        for tensor in tensors.values():
            sent = tensor.detach() if peers.rank == 0 else None
            received = peers.broadcast(sent, tensor, 0)
            if peers.rank:
                tensor.copy_(received)
