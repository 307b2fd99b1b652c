"""Inputs: what a model was given while it trained, kept in host memory and, in a checkpoint, beside the snapshot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, is_grad_enabled, nn
from torch.utils.hooks import RemovableHandle

from gradpruner.distributed.processes import Peers, together
from gradpruner.errors import CheckpointError
from gradpruner.probe.host_copies import Arrival, to_host
from gradpruner.storage.checked_tensors import read_checked, read_described, write_described

FORMAT = "gradpruner.training.probe_batches/1"
# one a process: each has seen batches of its own. Safetensors under another ending: these are no weights
FILES = "gradpruner_inputs-*.state"
TOKENS = 131_072  # at most, of each process; 2 MiB of token ids and mask


class Inputs:
    """The batches of a model in training mode, as it is called: tensors that are keyword arguments, but for labels.

    batches: those of the same run before it was interrupted. Kept are at most TOKENS tokens, and the first batch.
    """

    def __init__(self, batches: Iterable[Mapping[str, Tensor]] = ()) -> None:
        self._batches = [dict(batch) for batch in batches]
        self._tokens = sum(map(_tokens, self._batches))
        self._coming: list[Arrival] = []
        self._handle: RemovableHandle | None = None

    @property
    def batches(self) -> list[dict[str, Tensor]]:
        """What was kept so far, in host memory: copies that are still under way are waited for here."""
        for batch, arrival in zip(self._batches[len(self._batches) - len(self._coming) :], self._coming, strict=True):
            arrival.wait()
            batch.update({name: value.clone() for name, value in batch.items() if value.is_pinned()})
        self._coming.clear()
        return self._batches

    def watch(self, model: nn.Module) -> None:
        """Begin to keep what `model`, as the loop calls it, is given."""
        self._handle = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def stop(self) -> None:
        """Let go of the model; the batches stay."""
        if self._handle is not None:
            self._handle.remove()

    def _see(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not module.training or not is_grad_enabled():  # an evaluation, or a reference to compare with
            return
        given = {name: value for name, value in kwargs.items() if isinstance(value, Tensor) and value.ndim}
        batch = {name: value for name, value in given.items() if "label" not in name}
        if batch and (not self._batches or self._tokens + _tokens(batch) <= TOKENS):
            self._batches.append({name: to_host([value.detach()], value.dtype)[0] for name, value in batch.items()})
            self._coming.append(Arrival(value.device for value in batch.values()))
            self._tokens += _tokens(batch)


def _tokens(batch: Mapping[str, Tensor]) -> int:
    first = batch.get("input_ids", next(iter(batch.values())))
    return first.shape[:2].numel()


def save_inputs(batches: Iterable[Mapping[str, Tensor]], folder: Path, peers: Peers | None) -> None:
    """Write this process's file, with checksums; every process calls it, and goes on when all have written theirs.

    Raises CheckpointError (disk full).
    """
    rank, size = (0, 1) if peers is None else (peers.rank, peers.size)
    tensors = {f"{i}/{name}": tensor.contiguous() for i, batch in enumerate(batches) for name, tensor in batch.items()}
    with together(peers):
        path = folder / FILES.replace("*", f"{rank:05d}")
        write_described(path, tensors, {"format": FORMAT, "processes": size})


def load_inputs(folder: Path, peers: Peers | None) -> list[dict[str, Tensor]]:
    """What this process has saved; other processes than then share the files. Raises CheckpointError."""
    files = sorted(folder.glob(FILES))
    if not files:
        raise CheckpointError(
            f"{folder} lacks the inputs that the probe has seen, {FILES}: it was written by a run without patches. "
            "Resume with patch=False"
        )
    mine = files if peers is None else files[peers.rank :: peers.size]
    found: list[dict[str, Tensor]] = []
    with together(peers):
        for file in mine:
            found += _read(file, len(files))
    return found


def _read(file: Path, files: int) -> list[dict[str, Tensor]]:
    stored, header = read_described(file, "inputs", FORMAT)
    batches: dict[int, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        number, _, key = name.partition("/")
        if not (number.isdecimal() and number.isascii() and key):
            raise CheckpointError(f"{file} is corrupted: {name!r} belongs to no batch")
        batches.setdefault(int(number), {})[key] = read_checked(tensor, header["crc32"])
    processes = header.get("processes")
    if processes != files:
        raise CheckpointError(f"{file.parent} holds the inputs of {files} processes; {processes} have saved theirs")
    return [batches[number] for number in sorted(batches)]
