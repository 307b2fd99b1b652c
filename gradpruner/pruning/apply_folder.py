"""`apply_folder`: remove layers from file to file, for models that do not fit in memory."""

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
from gradpruner.model.logits import differ, log_unchecked_windows, logits_of, longer_input
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
    """A kept weight that others are merged into, all of them still in their files.

    Args:
        kept: the weight.
        donors: the weights that are merged into it, ascending by layer.
        names: layer and name of each donor, by which its importance is found.
        dtype: the dtype that the model is loaded in.
        igia: the importance.
        share: share of each donor's entries that is used.
        scale: factor of the added entries.
    """

    kept: TensorInFile
    donors: tuple[TensorInFile, ...]
    names: tuple[tuple[int, str], ...]
    dtype: torch.dtype
    igia: Igia
    share: Fraction
    scale: float

    def content(self) -> Iterator[memoryview]:
        """Compute the merged weight and yield its bytes, while it stays in memory."""
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
    """Do on a checkpoint folder what `apply` does in memory, without loading the model.

    The result is byte for byte what `apply` and `save` would write. Kept layers are copied under their new index.
    Merged weights are computed one at a time: only that weight, its donors and their importance are in memory. Layers
    that are dropped are never read. Where the config says another dtype than the files have, weights are converted as
    transformers would convert them.

    The other files of the folder are copied too, except other weights, pickles, and Python code unless
    `trust_remote_code`. Masks of single weights (from `sparsify`) are copied for the kept layers. Fields of the
    generation config that transformers would refuse to write are left out, and logged.

    The folder gets its name only after its files were read again: every checksum, then keys, shapes and dtypes by the
    stock class. Where the dense model fits in memory twice, the logits are compared with those of the dense model with
    the same layers skipped.

    Args:
        source: folder of the dense checkpoint: safetensors, in one file or in shards.
        out: folder to write.
        plan: which layers are removed and merged. Patches cannot be fitted without running the model: use `apply`.
        igia: importance of the entries of the weights. None if the plan merges nothing. `Igia.load(..., lazy=True)`
            leaves the importance in its file.
        preset: "default" or "paper": decides `top` and `weight` where they are not given. Adapters play no part.
        top: share of the entries of each merged weight that is used, see `apply`.
        weight: factor of the merged entries, see `apply`.
        overwrite: replace `out` if it exists. Default: refuse.
        trust_remote_code: use and copy Python code that lies in the folder. Default: do not.

    Returns:
        The path of `out`.

    Raises:
        InvalidArgument: an argument is not accepted, or the folder has no such checkpoint.
        ModelMismatch: plan or igia was made for another model.
        UnsupportedModel: the layers cannot be removed.
        CheckpointError: the checkpoint is damaged, or what was written reads back differently.

    Example:
        gradpruner.apply_folder("SmolLM2-135M", "small", gradpruner.Plan.load("plan.json"))

    Source: docs/method.md, sections 3 and 5.
    """
    # 1. Check everything, and decide what is written; the weights are not read yet.
    settings = Preset.of(preset, top=top, weight=weight)
    share, source = exact_share("top", settings.top), Path(source)
    stored = StoredModel(source, trust_remote_code=trust_remote_code)
    check_fits(stored.decoder, plan, igia, stored.samples)
    masks, earlier = _kept_masks(stored, source, plan), plan_in(source, len(stored.decoder.layers))
    surgery = prepare(stored.decoder, plan.kept)
    merges = _merges(stored, plan, igia, share, settings.weight) if igia is not None else {}
    pending = _pending(stored, plan, merges)
    # 2. Cut the empty model. It has the config that is written, and the shapes that must be read back.
    surgery.perform()
    if stored.unused:
        logger.warning(
            f"{len(stored.unused)} tensors of {source} stay behind, the model has no place for them: "
            f"{', '.join(stored.unused[:3])}{', ...' if len(stored.unused) > 3 else ''}"
        )
    with atomic_folder(out, overwrite=overwrite) as temporary:
        # 3. Write weights, config and the other files.
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
        # 4. Read back and compare.
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
    """The masks of the folder for the kept layers, after a check that they are not stale."""
    if not (source / MASKS).is_file():
        return None
    masks = Masks.load(source / MASKS)
    check_stored(stored, masks)
    return masks.of_layers(stored.model, plan.kept)


def _merges(stored: StoredModel, plan: Plan, igia: Igia, share: Fraction, scale: float) -> dict[str, Merge]:
    """The weights that others are merged into, by the name of their parameter."""
    decoder, merges = stored.decoder, {}
    for target, donors in plan.donors.items():
        for kept in [w for w in decoder.weights if w.layer == target]:
            layers = donors_of(kept, donors, igia)
            if not layers:
                continue
            by_layer = {w.layer: w for w in decoder.weights if w.name == kept.name}
            merges[stored.parameter_name(kept)] = Merge(
                _whole(stored, kept),
                tuple(_whole(stored, by_layer[donor]) for donor in layers),
                tuple((donor, kept.name) for donor in layers),
                decoder.parameter(kept).dtype,
                igia,
                share,
                scale,
            )
    return merges


def _whole(stored: StoredModel, weight: Weight) -> TensorInFile:
    """The tensor in the files that is this weight. Refuse weights stored in parts."""
    name = stored.parameter_name(weight)
    if name not in stored.one_to_one:
        raise UnsupportedModel(f"{name!r}, to be merged, is stored in another form than the model has it: {IN_MEMORY}")
    return stored.one_to_one[name]


def _pending(stored: StoredModel, plan: Plan, merges: dict[str, Merge]) -> dict[str, Pending]:
    """What will be written, in the order of the files, by the name that each tensor has there."""
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
    """Write config.json as save_pretrained writes it."""
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
    before, after = expected.state_dict(), again.state_dict()
    if before.keys() != after.keys():
        raise CheckpointError(
            f"the checkpoint does not reload: keys differ, {sorted(before.keys() ^ after.keys())[:3]}"
        )
    for name, tensor in before.items():
        other = after[name]
        if (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
            raise CheckpointError(
                f"{name} reloads as {tuple(other.shape)} {other.dtype}, not {tuple(tensor.shape)} {tensor.dtype}"
            )


def _check_logits(
    kind: Any, source: Path, folder: Path, plan: Plan, replaced: dict[str, TensorInFile], trust_remote_code: bool
) -> None:
    """Compare the written model with the dense one that skips the removed layers."""
    with quiet():
        dense, small = (
            kind.from_pretrained(path, config=config_of(path, trust_remote_code), dtype="auto", use_safetensors=True)
            for path in (source, folder)
        )
    with torch.no_grad():
        for name, tensor in replaced.items():
            dense.get_parameter(name).copy_(tensor.read())
    log_unchecked_windows(dense.config)
    tokens = longer_input(dense.config)
    expected = skipping_logits(Decoder(dense), plan.removed, tokens)
    difference = differ(expected, logits_of(small, tokens), dense.dtype)
    if difference is not None:
        raise UnsupportedModel(
            "the written model's logits are not those of the dense model with the same layers skipped (by "
            f"{difference:.3g})"
        )
