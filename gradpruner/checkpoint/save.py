"""Save a model as an ordinary checkpoint, which is verified before it gets its name."""

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
    """Write a model with its config, and name the folder only after reading it back.

    The weights are safetensors. It is verified that the files describe a model with exactly these keys and shapes.
    Where the model fits in memory a second time, every tensor is compared bit for bit, and so are the logits, except
    those of a sharded model. Whatever fails, the folder is as it was before.

    In several processes all of them call it: the first one writes, the others wait. A model sharded by FSDP2 is
    gathered one tensor at a time into the first one's host memory. A field of the generation config that transformers
    reads and refuses to write is left out and logged.

    Args:
        model: a transformers model without adapters and without quantised weights.
        folder: the checkpoint folder to make.
        tokenizer: saved beside the model. Default: none.
        plan: the plan that the model was pruned by, saved as gradpruner.json. Default: none.
        overwrite: whether a folder with content is replaced. Default False.
        group: None (default) if all processes of a training call this function. False if only one calls it, such as
            rank 0.
        beside: is called with the new folder before it gets its name, and writes further files into it. Default: none.

    Returns:
        The folder.

    Raises:
        InvalidArgument: the model has adapters or quantised weights or is no transformers model; `folder` is a file, or
            exists with content and `overwrite` is False; `group` is not accepted; or the processes name different
            folders. Every process raises it.
        CheckpointError: it could not be written, or the files do not load as the same model. Every process raises it.

    Example:
        ```python
        gradpruner.save(model, "small", tokenizer=tokenizer, plan=plan)
        ```
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
    """Return the plan in a checkpoint folder, None if there is none.

    Args:
        folder: the folder.
        layers: how many decoder layers its model has.

    Raises:
        ModelMismatch: the plan leaves another number of layers.
        CheckpointError: the plan is damaged.
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
    """Gather a sharded state dict into host memory, by one collective per tensor.

    The result is empty in a process that does not keep it.
    """
    state: dict[str, torch.Tensor] = {}
    gathered: dict[int, torch.Tensor] = {}  # by identity: tied weights stay one tensor
    for name, tensor in base.state_dict(keep_vars=True).items():
        if id(tensor) not in gathered:
            full = whole(tensor.detach())
            gathered[id(tensor)] = full.cpu() if keep else torch.empty(0)
        if keep:
            state[name] = gathered[id(tensor)]
    return state


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
    """Remove from auto_map in config.json the code that is not in the folder."""
    fields = read_json(folder / "config.json", "config")
    classes = fields.get("auto_map") or {}
    # "owner/name--file.Class" is code of another repository
    present = {k: v for k, v in classes.items() if "--" in str(v) or (folder / f"{str(v).split('.')[0]}.py").is_file()}
    if present != classes:
        missing = sorted(classes.keys() - present.keys())
        logger.warning(f"config.auto_map names code that does not come along: {missing}")
        others = {name: value for name, value in fields.items() if name != "auto_map"}
        write_json(folder / "config.json", others | ({"auto_map": present} if present else {}))


@contextlib.contextmanager
def _counting_what_is_there(base: Any) -> Iterator[None]:
    """Make the config count only layers that the model has, inside the block.

    Layers beside the decoder, such as those for multi-token prediction, may be in the config and not in the model.
    """
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
    """Check that transformers loads a folder as exactly this model.

    Args:
        model: the model that was saved.
        folder: where it was saved.
        state: the gathered state dict of a sharded model. Its logits are not compared then.

    Raises:
        CheckpointError: it does not: keys, shapes, values or logits differ.
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
        except torch.OutOfMemoryError:  # a GPU that training has filled; every tensor has been compared already
            return
        gap = differ(logits_of(model), reloaded, first.dtype)
        if gap is not None:
            raise CheckpointError(f"the checkpoint reloads with the same weights but other logits (by {gap:.3g})")


def _same(reloaded: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Return whether two tensors are equal bit for bit.

    A model of mixed dtypes reloads in one dtype. Its tensors are then compared as rounded to that.
    """
    a, b = reloaded.cpu().contiguous(), tensor.detach().cpu().to(reloaded.dtype).contiguous()
    return a.numel() == 0 or torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def check_loaded(model: nn.Module, info: Mapping[str, Any]) -> None:
    """Check that a checkpoint and a model have the same tensors.

    Args:
        model: the model.
        info: what transformers says of the loading, by `output_loading_info`.

    Raises:
        CheckpointError: a tensor is missing, too many, or of another shape.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())  # in this model, not in its class
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        names = [name for name in info.get(what, ()) if name not in tied]
        if names:
            raise CheckpointError(f"the checkpoint does not reload: {what} {sorted(map(str, names))[:3]}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Switch off the progress bars of transformers, inside the block.

    They would show loading that the user did not ask for.
    """
    was = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            transformers_logging.enable_progress_bar()
