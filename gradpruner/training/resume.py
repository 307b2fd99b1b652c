"""What `attach` leaves on disk beside a Trainer's own files, and how a resumed run finds it again."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from gradpruner.checkpoint.stored_model import StoredModel
from gradpruner.distributed.sharding import whole
from gradpruner.errors import CheckpointError, InvalidArgument
from gradpruner.model.decoder import Decoder, base_parameters, is_packed
from gradpruner.plan import Plan
from gradpruner.pruning.adapters import assign
from gradpruner.pruning.patch import Patch
from gradpruner.storage.files import read_json
from gradpruner.storage.tensor_files import bytes_of

FOLDER = "gradpruner"  # in the Trainer's output_dir: plan, scores, and the cut base model of adapters
# in a checkpoint made while the probe watches; safetensors under another ending, or servers would load it as weights
SNAPSHOT = "gradpruner_probe.state"
TRAINER_STATE = "trainer_state.json"  # the Trainer writes it last


def newest_complete(folder: str | os.PathLike[str]) -> str:
    """The newest checkpoint that was written to the end. Raises CheckpointError if there is none."""
    found = [p for p in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if re.fullmatch(r".*-\d+", p.name)]
    finished = [p for p in found if is_complete(p)]
    if not finished:
        raise CheckpointError(f"{str(folder)!r} holds no complete checkpoint ({len(found)} incomplete)")
    return str(max(finished, key=lambda p: int(p.name.rpartition("-")[2])))


def is_complete(checkpoint: Path) -> bool:
    """Whether the Trainer wrote the last of its files."""
    try:
        read_json(checkpoint / TRAINER_STATE, "trainer state")
    except (OSError, InvalidArgument, CheckpointError):
        return False
    return True


def load_changed(decoder: Decoder, plan: Plan, patched: Iterable[tuple[int, str]], folder: Path) -> None:
    """Take what was merged and patched of the cut base model from the checkpoint that was made of it, one at a time.

    patched: layer of the dense model and name of each patched weight.
    """
    stored, targets = StoredModel(folder), {plan.kept.index(target) for target in plan.donors}
    single = {(plan.kept.index(layer), name) for layer, name in patched}
    with torch.no_grad():
        for weight in [w for w in decoder.weights if w.layer in targets or (w.layer, w.name) in single]:
            name = stored.parameter_name(weight)
            if name in stored.one_to_one:
                values = stored.one_to_one[name].read()
            else:  # stored in another form, a matrix an expert, say
                kind: Any = type(decoder.base)
                values = kind.from_pretrained(folder, dtype="auto").get_parameter(name)
            assign(decoder.parameter(weight), values)


def mark_of(plan: Plan, merging: Mapping[str, Any], patches: Iterable[Patch] = ()) -> str:
    """Tells what was done to a model from anything else that could have been done to it."""
    content = json.dumps([plan.to_dict(), dict(merging)], sort_keys=True, default=str)  # a share may be a Fraction
    mark = hashlib.sha256(content.encode())
    for patch in patches:
        mark.update(f"{patch.weight.layer}/{patch.weight.name}".encode())
        mark.update(bytes_of(patch.change))
    return mark.hexdigest()[:8]


def is_quantised(decoder: Decoder) -> bool:
    """Whether a quantiser has packed weights of the decoder layers."""
    return any(is_packed(decoder.parameter(weight)) for weight in decoder.weights)


def full_precision(decoder: Decoder) -> Path:
    """The folder of the checkpoint that a quantised model was loaded from, checked to be that one.

    Raises InvalidArgument if it is not on this machine or is another one, UnsupportedModel if it is quantised itself.
    """
    name = str(getattr(decoder.config, "_name_or_path", ""))
    folder = Path(name)
    if not name or not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except Exception as error:
            raise InvalidArgument(
                f"the full-precision checkpoint {name!r} of the quantised base is not here"
            ) from error
    stored = StoredModel(folder)
    for parameter_name, parameter in base_parameters(decoder.base):
        if parameter.ndim != 1 or is_packed(parameter) or parameter_name not in stored.one_to_one:
            continue  # norms and biases are left as they are
        known = stored.one_to_one[parameter_name].read().to(torch.bfloat16)
        if not torch.equal(known, whole(parameter.detach()).cpu().to(torch.bfloat16)):
            raise InvalidArgument(f"{folder} is not what the quantised base was loaded from (another revision?)")
    return folder
