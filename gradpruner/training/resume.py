"""What `attach` leaves on disk beside a Trainer's own files, and how a resumed run uses it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from gradpruner.checkpoint.save import PLAN_FILE, save
from gradpruner.checkpoint.stored_model import StoredModel
from gradpruner.distributed.processes import peers_of, together
from gradpruner.distributed.sharding import whole
from gradpruner.errors import CheckpointError, InvalidArgument, ModelMismatch
from gradpruner.model.decoder import Decoder, base_parameters, is_packed
from gradpruner.model.wrappers import peft_of
from gradpruner.plan import Plan
from gradpruner.probe.igia import Igia
from gradpruner.pruning.adapters import assign, describe, without_adapters
from gradpruner.pruning.apply_folder import apply_folder
from gradpruner.pruning.cut import cut
from gradpruner.pruning.patch import Patch
from gradpruner.storage.files import read_json, reading, write_json
from gradpruner.storage.tensor_files import bytes_of
from gradpruner.training.probe_batches import FILES

FOLDER = "gradpruner"  # in the Trainer's output_dir: plan, scores, and the cut base model of adapters
PLAN, SCORES = "plan.json", "igia.safetensors"  # in that folder
# In a checkpoint made during the probe. It is a safetensors file under another ending, because servers would load a
# file with the usual ending as weights.
SNAPSHOT = "gradpruner_probe.state"
TRAINER_STATE = "trainer_state.json"  # the Trainer writes it last


@dataclass(frozen=True)
class CutState:
    """What a checkpoint after the cut holds beside the Trainer's own files.

    Args:
        plan: of the cut.
        base: folder of the cut base model, None where no adapters train.
        patched: layer of the dense model and name of each patched weight.
    """

    plan: Plan
    base: Path | None
    patched: tuple[tuple[int, str], ...]


def newest_complete(folder: str | os.PathLike[str]) -> str:
    """Return the newest complete checkpoint. Raises CheckpointError if there is none."""
    checkpoints = [p for p in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if re.fullmatch(r".*-\d+", p.name)]
    finished = [p for p in checkpoints if is_complete(p)]
    if not finished:
        raise CheckpointError(f"{str(folder)!r} holds no complete checkpoint ({len(checkpoints)} incomplete)")
    return str(max(finished, key=lambda p: int(p.name.rpartition("-")[2])))


def is_complete(checkpoint: Path) -> bool:
    """Return whether the Trainer wrote the last of its files."""
    try:
        read_json(checkpoint / TRAINER_STATE, "trainer state")
    except (OSError, InvalidArgument, CheckpointError):
        return False
    return True


# after the cut


def write_results(
    trainer: Trainer, model: Any, plan: Plan, igia: Igia, patches: Sequence[Patch], merging: Mapping[str, Any]
) -> Path | None:
    """Write plan and scores, and the cut base model where the Trainer will save adapters only.

    Args:
        trainer: the Trainer. Everything is written to the folder `gradpruner` in its output_dir.
        model: its cut model, not wrapped.
        plan: of the cut.
        igia: of the probe.
        patches: of the gaps.
        merging: how weights were merged.

    Returns:
        The folder of the cut base model, or None if no adapters train.
    """
    arguments, peft, decoder = trainer.args, peft_of(model), Decoder(model)
    folder = Path(str(arguments.output_dir)) / FOLDER
    if arguments.should_save:
        folder.mkdir(parents=True, exist_ok=True)
        plan.save(folder / PLAN)
        dataclasses.replace(igia, importance={}).save(folder / SCORES)
    if peft is None:
        return None
    # another run in the same place, with another cut, gets a base of its own
    name = f"base-{decoder.fingerprint(content=True)}-{mark_of(plan, merging, patches)}"
    base = (folder / name).resolve()
    if is_quantised(decoder):
        with together(peers_of()):
            if arguments.should_save:
                apply_folder(full_precision(decoder), base, Plan(plan.layers, plan.removed), overwrite=True)
    else:
        tokenizer = getattr(trainer, "processing_class", None)
        save(without_adapters(decoder.base), base, tokenizer=tokenizer, plan=plan, overwrite=True)
    describe(peft, str(base))
    return base


def saved_igia(output_dir: Path, plan: Plan) -> Igia | None:
    """Return the scores that a run with the same plan wrote, or None.

    Args:
        output_dir: the Trainer's.
        plan: the plan that the scores must belong to.
    """
    folder = output_dir / FOLDER
    if (folder / PLAN).is_file() and Plan.load(folder / PLAN) == plan:
        return Igia.load(folder / SCORES)
    return None


# checkpoints


def remove_stale_files(checkpoint: Path) -> None:
    """Delete what a run that was killed while it wrote the same checkpoint has left there."""
    for name in (TRAINER_STATE, SNAPSHOT, PLAN_FILE):
        (checkpoint / name).unlink(missing_ok=True)
    for batches in checkpoint.glob(FILES):
        batches.unlink()


def write_cut(checkpoint: Path, state: CutState) -> None:
    """Write what a checkpoint after the cut must hold.

    Args:
        checkpoint: its folder.
        state: the cut.
    """
    base = None if state.base is None else os.path.relpath(state.base, checkpoint.resolve())
    write_json(checkpoint / PLAN_FILE, {**state.plan.to_dict(), "base": base, "patched": state.patched})


def read_cut(checkpoint: Path) -> CutState:
    """Read what `write_cut` wrote. Raises CheckpointError if it is damaged."""
    content = read_json(checkpoint / PLAN_FILE, "plan")
    plan, base = Plan.from_dict(content), content.get("base")
    with reading(str(checkpoint / PLAN_FILE)):
        patched = tuple((int(layer), str(name)) for layer, name in content.get("patched", ()))
    return CutState(plan, None if base is None else (checkpoint / base).resolve(), patched)


def rebuild_cut(
    model: Any,
    optimizer: Any,
    state: CutState,
    checkpoint: Path,
    *,
    is_cut: bool,
    adapters: str,
    seed: int,
) -> None:
    """Bring a Trainer's model to the shape that a checkpoint after the cut has.

    Args:
        model: the dense model, or the model after the same cut.
        optimizer: the Trainer's.
        state: what the checkpoint holds of the cut.
        checkpoint: its folder, for messages.
        is_cut: whether the model went through the same cut already.
        adapters: "keep" or "discard", as for the cut.
        seed: of adapters that start anew.

    Raises:
        ModelMismatch: the checkpoint is of another model.
        CheckpointError: the cut base model is missing.
    """
    peft = peft_of(model)
    if (state.base is None) != (peft is None):
        raise ModelMismatch(
            f"checkpoint {str(checkpoint)!r} is of a model {'without' if state.base is None else 'with'} adapters; "
            f"the Trainer's has {'none' if peft is None else 'some'}"
        )
    if not is_cut:
        # nothing is merged here: the Trainer, or the cut base model, has the merged weights
        plan = Plan(state.plan.layers, state.plan.removed, model=state.plan.model)
        cut(model, optimizer, plan, adapters=adapters, seed=seed)
    if state.base is None:
        return
    if not state.base.is_dir():
        raise CheckpointError(f"the cut base model {str(state.base)!r} of {str(checkpoint)!r} is gone")
    if state.plan.merge or state.patched:
        load_changed(Decoder(model), state.plan, state.patched, state.base)
    if state.base.name.rpartition("-")[0] != f"base-{Decoder(model).fingerprint(content=True)}":
        raise ModelMismatch(f"the base model is not that of {str(checkpoint)!r}: expected {state.base}")
    describe(peft, str(state.base))


def load_changed(decoder: Decoder, plan: Plan, patched: Iterable[tuple[int, str]], folder: Path) -> None:
    """Read the merged and patched weights of a cut base model from its checkpoint.

    One weight is in memory at a time.

    Args:
        decoder: of the cut model. Its weights are changed.
        plan: of the cut.
        patched: layer of the dense model and name of each patched weight.
        folder: the checkpoint of the cut base model.
    """
    stored, targets = StoredModel(folder), {plan.kept.index(target) for target in plan.donors}
    patched_now = {(plan.kept.index(layer), name) for layer, name in patched}
    changed = [w for w in decoder.weights if w.layer in targets or (w.layer, w.name) in patched_now]
    with torch.no_grad():
        for weight in changed:
            name = stored.parameter_name(weight)
            if name in stored.one_to_one:
                values = stored.one_to_one[name].read()
            else:  # stored in another form, for example one matrix per expert
                kind: Any = type(decoder.base)
                values = kind.from_pretrained(folder, dtype="auto").get_parameter(name)
            assign(decoder.parameter(weight), values)


def mark_of(plan: Plan, merging: Mapping[str, Any], patches: Iterable[Patch] = ()) -> str:
    """Compute a short name for a cut that no other cut of the same model has.

    Args:
        plan: of the cut.
        merging: how weights were merged.
        patches: the patches of the gaps.

    Returns:
        Eight hexadecimal digits.
    """
    content = json.dumps([plan.to_dict(), dict(merging)], sort_keys=True, default=str)  # a share may be a Fraction
    mark = hashlib.sha256(content.encode())
    for patch in patches:
        mark.update(f"{patch.weight.layer}/{patch.weight.name}".encode())
        mark.update(bytes_of(patch.change))
    return mark.hexdigest()[:8]


# quantised bases


def is_quantised(decoder: Decoder) -> bool:
    """Return whether weights of the decoder layers are packed by a quantiser."""
    return any(is_packed(decoder.parameter(weight)) for weight in decoder.weights)


def full_precision(decoder: Decoder) -> Path:
    """Return the folder of the checkpoint that a quantised model was loaded from.

    Raises:
        InvalidArgument: it is not on this machine, or its weights are others.
        UnsupportedModel: it is quantised itself.
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
