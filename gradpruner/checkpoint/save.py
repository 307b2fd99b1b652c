"""Saving: an ordinary Hugging Face checkpoint, verified before it gets its name."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from gradpruner.checkpoint.generation_config import saved_as_far_as_possible
from gradpruner.distributed.processes import peers_of, together
from gradpruner.distributed.sharding import is_sharded, whole
from gradpruner.errors import CheckpointError, GradPrunerError, InvalidArgument, ModelMismatch
from gradpruner.memory import free_memory
from gradpruner.model.empty_model import absent_counts
from gradpruner.model.extra_layers import assign, log_counts_set_to_zero
from gradpruner.model.full_precision import check_full_precision
from gradpruner.model.logits import differ, logits_of
from gradpruner.model.wrappers import is_peft, unwrap
from gradpruner.plan import Plan
from gradpruner.storage.files import atomic_folder, read_json, write_json

logger = logging.getLogger(__name__)

PLAN_FILE = "gradpruner.json"


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    plan: Plan | None = None,
    overwrite: bool = False,
    group: Any = None,
    beside: Callable[[Path], object] | None = None,
) -> Path:
    """Write the model as safetensors with its config, verify it by reading it back, and only then name it `folder`.

    Verified: the files describe a model with exactly these keys and shapes, and, where the model fits in memory a
    second time, every tensor bit for bit, and the logits (of a sharded model not the logits). tokenizer: saved beside
    it. plan: kept as gradpruner.json.

    In several processes all of them call it: the first one writes, the others wait for it. A model sharded by FSDP2
    is gathered one tensor at a time into its host memory. group: False where the process of rank 0 saves alone. beside:
    writes what else belongs into the folder that it is given, before that gets its name.
    A field of the generation config that transformers reads and will not write is left out, and logged.
    Raises InvalidArgument (adapters not merged, quantised weights, folder in use) or CheckpointError, in every process;
    the folder is then as it was.
    """
    base: Any = unwrap(model)
    if group not in (None, False):
        raise InvalidArgument(f"group = {group!r}; accepted are None and False")
    if is_peft(model) or any(hasattr(m, "lora_A") for m in base.modules()):
        raise InvalidArgument("model still has adapters; expected a plain model (merge_and_unload first)")
    if not hasattr(base, "save_pretrained"):
        raise InvalidArgument(f"model is a {type(base).__name__}; expected a transformers model")
    check_full_precision(base)
    sharded = any(map(is_sharded, base.parameters()))
    if sharded and group is False:
        raise InvalidArgument("group = False; expected None: the model is sharded, all processes save it together")
    peers = peers_of(group)
    if peers is not None and len(folders := set(peers.gather(os.fspath(folder)))) > 1:
        raise InvalidArgument(f"folder differs between the processes: {sorted(folders)}; expected one for all of them")
    writes = peers is None or peers.rank == 0
    state = _gathered(base, keep=writes) if sharded else None
    with together(peers):
        if writes:
            _write(base, folder, state, tokenizer, plan, overwrite, beside)
    return Path(folder)


def plan_in(folder: Path, layers: int) -> Plan | None:
    """The plan in a checkpoint folder whose model has so many decoder layers, None if there is none.

    Raises ModelMismatch if the plan leaves another number of layers, CheckpointError.
    """
    path = folder / PLAN_FILE
    if not path.is_file():
        return None
    plan = Plan.load(path)
    if layers != len(plan.kept):
        raise ModelMismatch(
            f"{path} keeps {len(plan.kept)} decoder layers; the model beside it has {layers}. "
            "Remove the file if it is another model's"
        )
    return plan


def _gathered(base: nn.Module, *, keep: bool) -> dict[str, torch.Tensor]:
    """The whole state dict in host memory, empty where it is not kept: a collective for each tensor in turn."""
    found: dict[str, torch.Tensor] = {}
    seen: dict[int, torch.Tensor] = {}  # tied weights stay one tensor
    for name, tensor in base.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            gathered = whole(tensor.detach())
            seen[id(tensor)] = gathered.cpu() if keep else torch.empty(0)
        if keep:
            found[name] = seen[id(tensor)]
    return found


def _write(
    base: Any,
    folder: str | os.PathLike[str],
    state: dict[str, torch.Tensor] | None,
    tokenizer: Any,
    plan: Plan | None,
    overwrite: bool,
    beside: Callable[[Path], object] | None,
) -> None:
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        try:
            with quiet(), _counting_what_is_there(base), saved_as_far_as_possible(base):
                # a copy of it: saving takes the tensors out one by one
                base.save_pretrained(temporary, **({} if state is None else {"state_dict": dict(state)}))
                if tokenizer is not None:
                    tokenizer.save_pretrained(temporary)
            drop_missing_code(temporary)
            if plan is not None:
                write_json(temporary / PLAN_FILE, plan.to_dict())
            if beside is not None:
                beside(temporary)
        except (OSError, GradPrunerError):
            raise
        except Exception as error:  # safetensors', torch's, a config's or a tokenizer's
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"could not write {folder}: {reason}; nothing was written") from error
        verify(base, temporary, state)


def drop_missing_code(folder: Path) -> None:
    """Take out of config.json's auto_map the files of code that are not in the folder: nothing could load them."""
    fields = read_json(folder / "config.json", "config")
    named = fields.get("auto_map") or {}
    # "owner/name--file.Class" is of another repository
    found = {k: v for k, v in named.items() if "--" in str(v) or (folder / f"{str(v).split('.')[0]}.py").is_file()}
    if found != named:
        logger.warning(f"config.auto_map names code that does not come along: {sorted(named.keys() - found.keys())}")
        rest = {name: value for name, value in fields.items() if name != "auto_map"}
        write_json(folder / "config.json", rest | ({"auto_map": found} if found else {}))


@contextlib.contextmanager
def _counting_what_is_there(base: Any) -> Iterator[None]:
    """The model's config without the layers that it counts and the model does not have; as it was again outside."""
    gone = absent_counts(type(base), base.config)
    generation = getattr(base, "generation_config", None)
    drafts = getattr(generation, "use_mtp", None)
    try:
        for part, name, _ in gone:
            assign(part, name, 0)
        if gone and drafts:
            generation.use_mtp = None  # type: ignore[union-attr]
        yield
        log_counts_set_to_zero(gone)
    finally:
        for part, name, value in gone:
            assign(part, name, value)
        if gone and drafts:
            generation.use_mtp = drafts  # type: ignore[union-attr]


def verify(model: nn.Module, folder: str | os.PathLike[str], state: Mapping[str, torch.Tensor] | None = None) -> None:
    """Raises CheckpointError unless the stock class loads `folder` as exactly `model`.

    state: the state dict of a model whose own is sharded; its logits are then not asked for.
    """
    kind: Any = type(model)
    expected = model.state_dict() if state is None else state
    size = sum(t.numel() * t.element_size() for t in expected.values())
    # a model too large for a second copy is loaded as names and shapes only
    placement = {} if 2 * size < free_memory() else {"device_map": {"": "meta"}}
    try:
        with quiet():
            again, info = kind.from_pretrained(
                folder,
                output_loading_info=True,
                use_safetensors=True,
                dtype="auto",
                attn_implementation=getattr(model.config, "_attn_implementation", None),
                **placement,
            )
    except GradPrunerError:
        raise
    except Exception as error:
        raise CheckpointError(f"the checkpoint does not load again: {error}") from error
    check_loaded(model, info)
    actual = again.state_dict()
    if actual.keys() != expected.keys():
        raise CheckpointError(
            f"the checkpoint does not reload: keys differ, {sorted(actual.keys() ^ expected.keys())[:3]}"
        )
    for name, tensor in expected.items():
        if actual[name].shape != tensor.shape:
            raise CheckpointError(f"{name} reloads with shape {tuple(actual[name].shape)}, not {tuple(tensor.shape)}")
        if not actual[name].is_meta and not _same(actual[name], tensor):
            raise CheckpointError(f"{name} reloads with other values")
    if not placement and state is None:
        first = next(model.parameters())
        try:
            reloaded = logits_of(again.to(first.device))
        except torch.OutOfMemoryError:  # a card that is full of training; every tensor is compared already
            return
        gap = differ(logits_of(model), reloaded, first.dtype)
        if gap is not None:
            raise CheckpointError(f"the checkpoint reloads with the same weights but other logits (by {gap:.3g})")


def _same(reloaded: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Bit for bit; a model of mixed dtypes reloads in one, so then as rounded to it."""
    a, b = reloaded.cpu().contiguous(), tensor.detach().cpu().to(reloaded.dtype).contiguous()
    return a.numel() == 0 or torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def check_loaded(model: nn.Module, info: Mapping[str, Any]) -> None:
    """Raises CheckpointError if transformers' loading info says that a checkpoint and `model` do not match."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())  # in this model, not in its class
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        names = [name for name in info.get(what, ()) if name not in tied]
        if names:
            raise CheckpointError(f"the checkpoint does not reload: {what} {sorted(map(str, names))[:3]}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Saving and reading back are steps of ours: no progress bars of transformers'."""
    was = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            transformers_logging.enable_progress_bar()
