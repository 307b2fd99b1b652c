"""apply for a checkpoint folder: from file to file, one weight at a time, so the model need not fit in memory."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from gradpruner.checkpoint.card import carry_card
from gradpruner.checkpoint.generation_config import rewrite
from gradpruner.checkpoint.masks import Masks
from gradpruner.checkpoint.other_files import copy_others
from gradpruner.checkpoint.save import PLAN_FILE, check_loaded, drop_missing_code, plan_in, quiet
from gradpruner.checkpoint.save_sparse import MASKS, check_stored
from gradpruner.checkpoint.stored_model import IN_MEMORY, StoredModel, config_of, load_empty
from gradpruner.checks import exact_share
from gradpruner.errors import CheckpointError, UnsupportedModel
from gradpruner.memory import free_memory
from gradpruner.model.decoder import Decoder, Weight
from gradpruner.model.extra_layers import generation_changes
from gradpruner.model.logits import differ, logits_of, longer_input, say_what_is_not_passed
from gradpruner.plan import Plan
from gradpruner.presets import Preset
from gradpruner.probe.igia import Igia
from gradpruner.pruning.apply import check_fits, skipping_logits
from gradpruner.pruning.merge import donors_of, merge_weight_
from gradpruner.pruning.surgery import prepare
from gradpruner.storage.files import atomic_folder, read_json, write_json
from gradpruner.storage.tensor_files import Pending, TensorInFile, bytes_of, checksum_of, read_folder, write_folder

logger = logging.getLogger(__name__)

LARGEST_SHARD = 5 * 10**9  # bytes


@dataclass(frozen=True)
class Merge:
    """One kept weight that is folded into: where it and its donors are stored, and how they are added."""

    kept: TensorInFile
    donors: tuple[TensorInFile, ...]
    names: tuple[tuple[int, str], ...]  # of the donors' importance
    dtype: torch.dtype  # that the model is loaded in
    igia: Igia
    share: Fraction
    scale: float

    def content(self) -> Iterator[memoryview]:
        """The merged weight's bytes; it and its donors are in memory until they are taken."""
        weight = self.kept.read().to(self.dtype)
        donors = [donor.read().to(self.dtype) for donor in self.donors]
        importance = [self.igia.importance[name] for name in self.names]
        with torch.no_grad():
            merge_weight_(weight, donors, importance, self.share, self.scale)
        del donors, importance
        yield bytes_of(weight)


def apply_folder(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    plan: Plan,
    igia: Igia | None = None,
    *,
    preset: str = "default",
    top: float | None = None,
    weight: float | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Write to `out` what `apply` and `save` would make of the checkpoint folder `source`, without loading it.

    The same bytes, tensor by tensor: kept layers are copied under their new index (converted where transformers would
    load them in another dtype than the files have, as config.json says), merged weights are computed one
    at a time (in memory: that weight, its donors, their importance), and layers that are only dropped are never
    read. source: safetensors, in one file or shards. igia: `Igia.load(..., lazy=True)` leaves its importance in its
    file too. The other files of the folder come along, except other weights, pickles, and Python code unless
    trust_remote_code. Masks in the folder (`save_sparse`) come along for the layers that are kept. A field of the
    generation config that transformers would not write is left out, and logged. top, weight: see `apply`.
    Source: docs/method.md, section 3.

    The folder gets its name only after its files were read again: every checksum, and keys, shapes and dtypes by
    the stock class; where the dense model fits in memory twice, also the logits, against the dense model with the
    same layers skipped. Raises InvalidArgument, ModelMismatch, UnsupportedModel, CheckpointError.
    """
    settings = Preset.of(preset, top=top, weight=weight)
    share, source = exact_share("top", settings.top), Path(source)
    stored = StoredModel(source, trust_remote_code=trust_remote_code)
    check_fits(stored.decoder, plan, igia, stored.samples)
    masks, earlier = _kept_masks(stored, source, plan), plan_in(source, len(stored.decoder.layers))
    surgery = prepare(stored.decoder, plan.kept)
    merges = _merges(stored, plan, igia, share, settings.weight) if igia is not None else {}
    pending = _pending(stored, plan, merges)
    surgery.perform()
    if stored.unused:
        logger.warning(
            f"{len(stored.unused)} tensors of {source} stay behind, the model has no place for them: "
            f"{', '.join(stored.unused[:3])}{', ...' if len(stored.unused) > 3 else ''}"
        )
    with atomic_folder(out, overwrite=overwrite) as temporary:
        totals = {"total_parameters": stored.model.num_parameters()}
        checksums = write_folder(temporary, list(pending.values()), _largest_shard(stored), totals)
        _write_config(stored.model, temporary)
        copy_others(source, temporary, code=trust_remote_code)
        drop_missing_code(temporary)
        _cut_generation(temporary, plan, extra_gone=bool(surgery.absent))
        rewrite(temporary)
        carry_card(source, temporary)
        write_json(temporary / PLAN_FILE, dataclasses.replace(plan, before=earlier).to_dict())
        if masks is not None:
            masks.save(temporary / MASKS)
            check_stored(StoredModel(temporary, trust_remote_code=trust_remote_code), masks)
        written = read_folder(temporary)
        _check_bytes(written, checksums)
        kind = type(stored.model)
        again, info = load_empty(kind, config_of(temporary, trust_remote_code), written)
        _check_same_model(stored.model, again, info)
        if 2 * sum(tensor.size for tensor in stored.tensors.values()) < free_memory():
            replaced = {name: written[pending[merge.kept.name].name] for name, merge in merges.items()}
            _check_logits(kind, source, temporary, plan, replaced, trust_remote_code)
    return Path(out)


def _kept_masks(stored: StoredModel, source: Path, plan: Plan) -> Masks | None:
    """The masks of the folder for the layers that stay; checked first, so that no stale ones are carried along."""
    if not (source / MASKS).is_file():
        return None
    masks = Masks.load(source / MASKS)
    check_stored(stored, masks)
    return masks.of_layers(stored.model, plan.kept)


def _merges(stored: StoredModel, plan: Plan, igia: Igia, share: Fraction, scale: float) -> dict[str, Merge]:
    """The weights to be folded into, by their parameter's name."""
    decoder, found = stored.decoder, {}
    for target, donors in plan.donors.items():
        for kept in [w for w in decoder.weights if w.layer == target]:
            layers = donors_of(kept, donors, igia)
            if not layers:
                continue
            own = {w.layer: w for w in decoder.weights if w.name == kept.name}
            found[stored.parameter_name(kept)] = Merge(
                _whole(stored, kept),
                tuple(_whole(stored, own[donor]) for donor in layers),
                tuple((donor, kept.name) for donor in layers),
                decoder.parameter(kept).dtype,
                igia,
                share,
                scale,
            )
    return found


def _whole(stored: StoredModel, weight: Weight) -> TensorInFile:
    name = stored.parameter_name(weight)
    if name not in stored.whole:
        raise UnsupportedModel(f"{name!r}, to be merged, is stored in another form than the model has it: {IN_MEMORY}")
    return stored.whole[name]


def _pending(stored: StoredModel, plan: Plan, merges: dict[str, Merge]) -> dict[str, Pending]:
    """What is to be written, by the name it is stored under now, in the order in which it is stored."""
    index = {old: new for new, old in enumerate(plan.kept)}
    pending = {}
    for name, tensor in stored.tensors.items():
        layer = stored.layer_of(name)
        if layer is not None and layer not in index:
            continue
        new = stored.renamed(name, None if layer is None else index[layer])
        merge = merges.get(stored.roles[name].parameter)
        if merge is None:
            dtype = stored.loaded_dtype(name)
            pending[name] = Pending(new, dtype, tensor.shape, functools.partial(tensor.chunks_as, dtype))
        else:
            pending[name] = Pending(new, merge.dtype, tensor.shape, merge.content)
    if len({tensor.name for tensor in pending.values()}) != len(pending):
        raise UnsupportedModel(f"two tensors would be stored under one name: {IN_MEMORY}")
    return pending


def _largest_shard(stored: StoredModel) -> int:
    files = {tensor.file for tensor in stored.tensors.values()}
    return LARGEST_SHARD if len(files) == 1 else min(LARGEST_SHARD, max(file.stat().st_size for file in files))


def _write_config(model: Any, folder: Path) -> None:
    """As save_pretrained writes it."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)


def _cut_generation(folder: Path, plan: Plan, *, extra_gone: bool) -> None:
    file = folder / "generation_config.json"
    if file.is_file():
        fields = read_json(file, "generation config")
        changes = generation_changes(fields, plan.kept, extra_gone=extra_gone)
        if changes:
            write_json(file, {**fields, **changes})


def _check_bytes(written: dict[str, TensorInFile], checksums: dict[str, int]) -> None:
    if written.keys() != checksums.keys():
        raise CheckpointError(f"the files do not hold {sorted(written.keys() ^ checksums.keys())[:3]} as written")
    for name, tensor in written.items():
        if checksum_of(tensor) != checksums[name]:
            raise CheckpointError(f"{name} reads back with other bytes than were written")


def _check_same_model(expected: Any, again: Any, info: dict[str, Any]) -> None:
    check_loaded(expected, info)
    wanted, found = expected.state_dict(), again.state_dict()
    if wanted.keys() != found.keys():
        raise CheckpointError(
            f"the checkpoint does not reload: keys differ, {sorted(wanted.keys() ^ found.keys())[:3]}"
        )
    for name, tensor in wanted.items():
        if (tensor.shape, tensor.dtype) != (found[name].shape, found[name].dtype):
            raise CheckpointError(
                f"{name} reloads as {tuple(found[name].shape)} {found[name].dtype}, not {tuple(tensor.shape)} "
                f"{tensor.dtype}"
            )


def _check_logits(
    kind: Any, source: Path, folder: Path, plan: Plan, replaced: dict[str, TensorInFile], trust_remote_code: bool
) -> None:
    """Compare the written model with the dense one, merged weights put in and removed layers skipped."""
    with quiet():
        dense, small = (
            kind.from_pretrained(path, config=config_of(path, trust_remote_code), dtype="auto", use_safetensors=True)
            for path in (source, folder)
        )
    with torch.no_grad():
        for name, tensor in replaced.items():
            dense.get_parameter(name).copy_(tensor.read())
    say_what_is_not_passed(dense.config)
    tokens = longer_input(dense.config)
    gap = differ(skipping_logits(Decoder(dense), plan.removed, tokens), logits_of(small, tokens), dense.dtype)
    if gap is not None:
        raise UnsupportedModel(
            f"the written model's logits are not those of the dense model with the same layers skipped (by {gap:.3g})"
        )
