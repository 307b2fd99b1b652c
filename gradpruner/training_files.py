"""What `attach` leaves on disk beside a Trainer's own files, and how a resumed run finds it again."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from gradpruner.adapters import assign
from gradpruner.decoder import Decoder, is_packed
from gradpruner.errors import CheckpointError, InvalidArgument

FOLDER = "gradpruner"  # in the Trainer's output_dir: plan, scores, and the cut base model of adapters
SNAPSHOT = "gradpruner_probe.safetensors"  # in a checkpoint made while the probe watches
TRAINER_STATE = "trainer_state.json"  # the Trainer writes it last


def newest_complete(folder: str | os.PathLike[str]) -> str:
    """The newest checkpoint that was written to the end. Raises CheckpointError if there is none."""
    found = [p for p in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if re.fullmatch(r".*-\d+", p.name)]
    whole = [p for p in found if is_complete(p)]
    if not whole:
        raise CheckpointError(f"{str(folder)!r} holds no complete checkpoint ({len(found)} incomplete)")
    return str(max(whole, key=lambda p: int(p.name.rpartition("-")[2])))


def is_complete(checkpoint: Path) -> bool:
    """Whether the Trainer wrote the last of its files."""
    try:
        json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def load_merged(decoder: Decoder, folder: Path) -> None:
    """Take the merged weights of the cut base model from the checkpoint that was made of it."""
    if not folder.is_dir():
        raise CheckpointError(f"the cut base model {str(folder)!r} is gone; merged layers cannot be rebuilt without it")
    kind: Any = type(decoder.base)
    known = Decoder(kind.from_pretrained(folder, dtype="auto"))
    with torch.no_grad():
        for weight in decoder.weights:
            assign(decoder.parameter(weight), known.parameter(weight))


def written_once(write: Callable[[], Any], *, writer: bool) -> None:
    """One process a machine writes, the others wait and fail with it. Raises CheckpointError."""
    if not (dist.is_available() and dist.is_initialized()):
        write()
        return
    failed: list[str | None] = [None]
    if writer:
        try:
            write()
        except Exception as error:
            failed = [f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(failed)
    if failed[0] is not None:
        raise CheckpointError(failed[0])


def is_quantised(decoder: Decoder) -> bool:
    """Whether a quantiser has packed weights of the decoder layers."""
    return any(is_packed(decoder.parameter(weight)) for weight in decoder.weights)


def full_precision(decoder: Decoder) -> Path:
    """The folder of the checkpoint that a quantised model was loaded from. Raises InvalidArgument."""
    name = str(getattr(decoder.config, "_name_or_path", ""))
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception as error:
        raise InvalidArgument(f"the full-precision checkpoint {name!r} of the quantised base is not here") from error
