"""Save a training while it runs, and go on from there after an interruption."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from gradpruner.checks import check_int
from gradpruner.distributed.processes import first
from gradpruner.distributed.sharding import whole
from gradpruner.errors import CheckpointError, InvalidArgument, ModelMismatch
from gradpruner.model.identity import Identity, sha256_of
from gradpruner.storage.files import read_json
from gradpruner.storage.provenance import MADE_FROM, RECORD, digest, need_same
from gradpruner.training.optimizer_state import divided

SHARE, LEAST = 0.1, 10  # default interval: a tenth of the steps, so that an interruption costs at most that much
PREFIX = "checkpoint"  # as the Trainer names its folders, `transformers.trainer_utils.PREFIX_CHECKPOINT_DIR`
WEIGHTS = "trained.safetensors"
MARK = ".gradpruner-checkpoints"  # in a folder that holds nothing else, and may be deleted
COPIES = 3  # a weight that trains, and the two moments that AdamW keeps of it


@dataclass(frozen=True)
class Checkpoints:
    """Where one training saves its checkpoints, and how often.

    The Trainer writes optimizer, schedule and random states in its own format. It reads them with torch's
    weights-only loader, which runs no code. The trained weights are safetensors. The newest complete checkpoint is
    kept, and it is deleted only after the next one is complete on disk.

    Args:
        folder: a folder for this training alone. `discard` deletes it.
        every: optimizer steps between two checkpoints. Default: a tenth of the steps, and at least 10.
        made_from: digests of what the training starts from, by name. See `gradpruner.storage.provenance`.

    Raises:
        InvalidArgument: `every` is not a whole number of 1 or more.
    """

    folder: Path
    every: int | None
    made_from: Mapping[str, str]

    def __post_init__(self) -> None:
        """Check the interval."""
        if self.every is not None:
            check_int("save_steps", self.every, 1, "a number of optimizer steps")

    def also_from(self, **digests: str) -> Checkpoints:
        """Return the same, with more digests."""
        return replace(self, made_from={**self.made_from, **digests})

    def interval(self, steps: int) -> int:
        """Return the optimizer steps between two checkpoints of a training of `steps` steps."""
        return max(LEAST, math.ceil(SHARE * steps)) if self.every is None else self.every

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint, or None. Delete all others.

        Of several processes, the first looks and deletes.

        Raises:
            InvalidArgument: the newest one belongs to another training, or the folder to somebody else.
        """
        return first(self._newest)

    def _newest(self) -> Path | None:
        if self.folder.is_dir() and any(self.folder.iterdir()) and not (self.folder / MARK).is_file():
            raise InvalidArgument(
                f"folder {str(self.folder)!r} is for checkpoints of this training, but other files are in it; expected "
                "no such folder, or an empty one: move it away, or write the model to another folder"
            )
        found = sorted(self.folder.glob(f"{PREFIX}-*"), key=_step)
        complete = [path for path in found if (path / RECORD).is_file()]
        newest = complete[-1] if complete else None
        if newest is not None:
            before = read_json(newest / RECORD, "checkpoint").get(MADE_FROM)
            need_same(newest, before, self.made_from, delete=[self.folder])
        for path in found:
            if path != newest:
                delete_checkpoint(path)
        return newest

    def make_folder(self, model: nn.Module) -> None:
        """Make the folder, if the disk can hold two checkpoints of `model` in it.

        Raises:
            InvalidArgument: the disk has too little room.
        """
        size = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        first(lambda: self._make_folder(size))

    def _make_folder(self, size: int) -> None:
        there = any(self.folder.glob(f"{PREFIX}-*"))  # the newest one: only one more is to come
        place = next(path for path in (self.folder, *self.folder.absolute().parents) if path.is_dir())
        needed, free = (1 if there else 2) * COPIES * size, shutil.disk_usage(place).free
        if free < needed:
            raise InvalidArgument(
                f"checkpoints in {str(self.folder)!r} need {needed / 1e9:.3g} GB, and the disk has {free / 1e9:.3g} GB "
                "left; expected more room, or a folder on another disk"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / MARK).touch()

    def discard(self) -> None:
        """Delete the folder, once the result of the training is on disk."""
        first(self._discard)

    def _discard(self) -> None:
        if (self.folder / MARK).is_file():
            for path in self.folder.glob(f"{PREFIX}-*"):
                delete_checkpoint(path)
            shutil.rmtree(self.folder, ignore_errors=True)


def checkpoints_beside(
    out: str | os.PathLike[str],
    every: int | None,
    identity: Identity,
    *,
    dtype: str,
    attention: str | None,
    masks: str | os.PathLike[str] | None,
    load_in_4bit: bool = False,
) -> Checkpoints:
    """Return where a training keeps its checkpoints: beside the folder of its model.

    Args:
        out: the folder of the trained model; the checkpoints are in `OUT-checkpoints`.
        every: see `Checkpoints`.
        identity: the model that is trained.
        dtype: what it is loaded in.
        attention: what it computes attention with.
        masks: a file of masks that the training keeps to. Those in the model's own folder are in its identity.
        load_in_4bit: whether the adapters are trained beside weights of 4 bits. Default False.
    """
    made_from = {
        "model": digest(identity.content),
        "package versions": digest(identity.versions),
        "dtype or attention": digest([dtype, attention, *(["4 bits"] if load_in_4bit else [])]),
        "masks": "none" if masks is None else sha256_of(Path(masks)),
    }
    return Checkpoints(Path(f"{Path(out)}-checkpoints"), every, made_from)


def recorded_state(checkpoint: Path) -> dict[str, Any]:
    """Return what a complete checkpoint holds of the training besides the Trainer's files."""
    state: dict[str, Any] = read_json(checkpoint / RECORD, "checkpoint")["watched"]
    return state


def save_trained(model: nn.Module, folder: Path, *, writes: bool = True) -> None:
    """Write the parameters that train, and all buffers, under their own names.

    Sharded parameters are gathered one at a time, which is a collective.

    Args:
        model: the model that trains.
        folder: where to write. It is made if it does not exist.
        writes: whether this process writes. In the others, nothing is kept.
    """
    buffers = {name for name, _ in model.named_buffers()}  # some share memory, which safetensors does not take
    state = {}
    for name, tensor in _state(model).items():
        full = whole(tensor.detach())
        if writes:
            state[name] = full.cpu().clone() if name in buffers else full.cpu().contiguous()
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / WEIGHTS)


def load_trained(model: nn.Module, folder: Path) -> None:
    """Read what `save_trained` wrote into the same model.

    Args:
        model: the model that trains.
        folder: what `save_trained` wrote.

    Raises:
        ModelMismatch: names, shapes or dtypes differ.
        CheckpointError: the file is damaged.
    """
    try:
        stored = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} cannot be read: {error}") from error
    state = _state(model)
    for name in sorted(state.keys() | stored.keys()):
        mine, theirs = state.get(name), stored.get(name)
        if mine is None or theirs is None or (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            raise ModelMismatch(f"{folder} is a checkpoint of another model: {name} differs")
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(divided(stored[name], tensor))


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters that train and the buffers."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {**trained, **dict(model.named_buffers())}


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def delete_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint, its record first: a half-deleted one must not count as complete."""
    (checkpoint / RECORD).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)
