"""Record the batches that a model was called with during the probe.

They are kept in host memory and in checkpoints. Patches are fitted on them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.utils.hooks import RemovableHandle

from gradpruner.distributed.processes import Peers, together
from gradpruner.errors import CheckpointError
from gradpruner.model.wrappers import wrappers
from gradpruner.probe.host_copies import Arrival, to_host
from gradpruner.storage.checked_tensors import read_checked, read_described, write_described

FORMAT = "gradpruner.inputs/1"
# One file per process, because each has batches of its own. They are safetensors files under another ending, because
# they hold no weights.
FILES = "gradpruner_inputs-*.state"
TOKENS = 131_072  # the most that each process keeps: 2 MiB of token ids and mask
LENGTHS = ("max_length_q", "max_length_k")  # numbers that belong to the tensors of a packed batch
Batch = dict[str, Any]  # of tensors, and of the numbers above


class ProbeBatches:
    """The batches that a model in training mode was called with.

    Of each call, the arguments that are tensors are kept, except labels, and the lengths of packed sequences. Batches
    are kept as long as they have at most `TOKENS` tokens together. The first batch is always kept. A call is left out
    if its attention mask is no tensor, since without it the model would see other tokens.

    Args:
        batches: those of the same run before it was interrupted.
    """

    def __init__(self, batches: Iterable[Mapping[str, Any]] = ()) -> None:
        self._batches: list[Batch] = [dict(batch) for batch in batches]
        self._tokens = sum(map(_token_count, self._batches))
        self._coming: list[Arrival] = []
        self._handle: RemovableHandle | None = None

    @property
    def batches(self) -> list[Batch]:
        """The batches so far, in host memory. Copies that are still under way are waited for."""
        for batch, arrival in zip(self._batches[len(self._batches) - len(self._coming) :], self._coming, strict=True):
            arrival.wait()
            batch.update({name: value.clone() for name, value in _tensors(batch) if value.is_pinned()})
        self._coming.clear()
        return self._batches

    def watch(self, model: nn.Module) -> None:
        """Begin to record the calls of `model`, which must be the module that the loop calls."""
        self._handle = model.register_forward_pre_hook(self._record, with_kwargs=True)

    def stop(self) -> None:
        """Stop recording. The batches stay."""
        if self._handle is not None:
            self._handle.remove()

    def _record(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not module.training or not is_grad_enabled():  # an evaluation, or a reference to compare with
            return
        if args:
            kwargs = {**dict(zip(_positional_names(module), args, strict=False)), **kwargs}
            if len(kwargs) < len(args):  # their names are not known
                return
        mask = kwargs.get("attention_mask")
        if mask is not None and not isinstance(mask, Tensor):
            return
        batch = {name: value for name, value in _tensors(kwargs) if value.ndim and "label" not in name}
        if batch and (not self._batches or self._tokens + _token_count(batch) <= TOKENS):
            numbers = {name: int(kwargs[name]) for name in LENGTHS if kwargs.get(name) is not None}
            copies = {name: to_host([value.detach()], value.dtype)[0] for name, value in batch.items()}
            self._batches.append({**copies, **numbers})
            self._coming.append(Arrival(value.device for value in batch.values()))
            self._tokens += _token_count(batch)


def _tensors(batch: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in batch.items() if isinstance(value, Tensor)]


def _positional_names(module: nn.Module) -> list[str]:
    """Return the names of a model's positional arguments."""
    for wrapper in wrappers(module):
        parameters = inspect.signature(wrapper.forward).parameters.values()
        names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        if names:
            return names
    return []


def _token_count(batch: Mapping[str, Any]) -> int:
    """Return rows times tokens of a batch."""
    first: Tensor = batch["input_ids"] if "input_ids" in batch else _tensors(batch)[0][1]
    return first.shape[:2].numel()


def save_batches(batches: Iterable[Mapping[str, Any]], folder: Path, peers: Peers | None) -> None:
    """Write the batches of this process, with checksums. It waits for all other processes.

    Args:
        batches: those of this process.
        folder: a checkpoint.
        peers: the processes of the training, None if there is one.

    Raises:
        CheckpointError: writing failed, for example because the disk is full.
    """
    rank, size = (0, 1) if peers is None else (peers.rank, peers.size)
    tensors = {
        f"{i}/{name}": torch.as_tensor(value).contiguous()
        for i, batch in enumerate(batches)
        for name, value in batch.items()
    }
    with together(peers):
        path = folder / FILES.replace("*", f"{rank:05d}")
        write_described(path, tensors, {"format": FORMAT, "processes": size})


def load_batches(folder: Path, peers: Peers | None) -> list[Batch]:
    """Read what this process has saved.

    If there are more or fewer processes now, they share the files.

    Args:
        folder: a checkpoint.
        peers: the processes of the training, None if there is one.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    files = sorted(folder.glob(FILES))
    if not files:
        raise CheckpointError(
            f"{folder} lacks the inputs that the probe has seen, {FILES}: it was written by a run without patches. "
            "Resume with patch=False"
        )
    own_files = files if peers is None else files[peers.rank :: peers.size]
    batches: list[Batch] = []
    with together(peers):
        for file in own_files:
            batches += _read(file, len(files))
    return batches


def _read(file: Path, files: int) -> list[Batch]:
    """Read the batches of one process. `files` is how many files the checkpoint has."""
    stored, header = read_described(file, "inputs", FORMAT)
    batches: dict[int, Batch] = {}
    for name, tensor in stored.items():
        number, _, key = name.partition("/")
        if not (number.isdecimal() and number.isascii() and key):
            raise CheckpointError(f"{file} is corrupted: {name!r} belongs to no batch")
        value = read_checked(tensor, header["crc32"])
        batches.setdefault(int(number), {})[key] = int(value) if key in LENGTHS else value
    processes = header.get("processes")
    if processes != files:
        raise CheckpointError(f"{file.parent} holds the inputs of {files} processes; {processes} have saved theirs")
    return [batches[number] for number in sorted(batches)]
