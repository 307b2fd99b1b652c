"""`cut`: remove layers inside a running training loop, whose objects stay the same."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradpruner.checks import exact_share
from gradpruner.distributed.fsdp import reshard
from gradpruner.errors import UnsupportedModel
from gradpruner.model.decoder import Decoder, base_name
from gradpruner.model.optimizers import check_optimizer, drop_state, replace, unwrapped
from gradpruner.model.rollback import restorer
from gradpruner.model.wrappers import peft_of, root_of, wrappers
from gradpruner.plan import Plan
from gradpruner.presets import Preset
from gradpruner.probe.igia import Igia
from gradpruner.pruning.adapters import check_adapters, make_fresh
from gradpruner.pruning.apply import removing
from gradpruner.pruning.patch import Patch


def cut(
    model: nn.Module,
    optimizer: Any,
    plan: Plan,
    igia: Igia | None = None,
    *,
    preset: str = "default",
    top: float | None = None,
    weight: float | None = None,
    patches: Sequence[Patch] = (),
    adapters: str | None = None,
    seed: int = 0,
    layers: str | nn.ModuleList | None = None,
) -> None:
    """Remove layers of a model in training, so that the same loop goes on with fewer layers.

    The model stays the same object, and so do its wrappers, adapters, optimizer and scheduler. Nothing is changed
    unless everything succeeds. Call it between two optimizer steps; in several processes, all of them call it.

    Args:
        model: as the loop calls it: plain, PEFT, compiled, prepared by accelerate, in DistributedDataParallel, or
            sharded by fully_shard.
        optimizer: torch's or accelerate's. Its groups lose the removed parameters. None if there is none yet.
        plan: which layers are removed and merged.
        igia: importance of the entries of the weights. None if the plan merges nothing.
        preset: "default" or "paper": decides `top`, `weight` and `adapters` where they are not given.
        top: share of the entries of each merged weight that is used, see `apply`.
        weight: factor of the merged entries, see `apply`.
        patches: those that `fit_patches` returned for this plan, the same on every process.
        adapters: "keep" the adapters and their state in the optimizer as they are (preset "default"), or "discard"
            what they learned: they start anew in place, without state (preset "paper"). Weights that train without
            adapters keep their state in any case.
        seed: decides the values of adapters that start anew. Default 0.
        layers: path of the ModuleList of decoder layers, or the list itself, for a model that is not Hugging Face's.

    Raises:
        InvalidArgument: an argument is not accepted, or the plan merges and `igia` has no importance of its layers.
        ModelMismatch: plan or igia was made for another model.
        UnsupportedModel: the layers cannot be removed, or the adapters are not LoRAs, or they cannot start anew.

    Example:
        plan = probe.igia.plan(ratio=0.4)
        patches = gradpruner.fit_patches(model, plan, batches)
        gradpruner.cut(model, optimizer, plan, patches=patches)

    Source: docs/method.md, sections 3 to 5.
    """
    # 1. Check what only a running loop has: wrappers, optimizer, adapters that stay in place.
    settings = Preset.of(preset, top=top, weight=weight, adapters=adapters)
    check_wrappers(model)
    decoder, peft, share = Decoder(model, layers), peft_of(model), exact_share("top", settings.top)
    inner = unwrapped(optimizer)
    if inner is not None:
        check_optimizer(inner)
    if peft is not None:
        check_adapters(peft, settings.adapters)
    # 2. Cut the model, and start its adapters anew if asked to.
    root = root_of(model)
    if root is not None:
        reshard(root)  # the optimizer holds the shards
    before = {id(p) for p in decoder.given.parameters()}
    acting = peft if settings.adapters == "keep" else None
    fresh: list[nn.Parameter] = []
    with removing(decoder, plan, igia, share, settings.weight, patches, acting=acting) as removal:
        if peft is not None and acting is None:
            fresh = _renewed(peft, seed)
    # 3. Tell the optimizer.
    gone = before - {id(p) for p in decoder.given.parameters()}
    if inner is not None:
        for old, new, cut_alike in removal.replaced:
            replace(inner, old, new, cut_alike)
        drop_state(inner, gone, {id(p) for p in fresh})
    # 4. Tell the wrappers, and give the memory back.
    for wrapper in wrappers(model):
        if isinstance(wrapper, DistributedDataParallel):
            _rewrap(wrapper)
    if any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules()):
        torch.compiler.reset()  # graphs of the dense model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _renewed(peft: nn.Module, seed: int) -> list[nn.Parameter]:
    """Start the adapters anew and return their parameters, or leave everything as it was."""
    restore = restorer(peft, [p for n, p in peft.named_parameters() if base_name(n) is None])
    try:
        return make_fresh(peft, seed)
    except BaseException:
        restore()
        raise


def check_wrappers(model: nn.Module) -> None:
    """Refuse a loop that calls a copy of the model: a cut would not reach its layers.

    Raises UnsupportedModel.
    """
    for wrapper in wrappers(model):
        if "_orig_mod" in vars(wrapper):  # torch.compile's own wrapper has it as a submodule
            raise UnsupportedModel(
                "the model is compiled by regions (accelerate's use_regional_compilation), which trains a copy of it: "
                "compile the whole model instead"
            )


def _rewrap(ddp: DistributedDataParallel) -> None:
    """Rebuild the reducer in place: the old one waits for gradients that never come."""
    names = set(inspect.signature(DistributedDataParallel.__init__).parameters) - {"self", "module", "device_mesh"}
    if hasattr(ddp, "forward_sync_buffers"):
        names -= {"broadcast_buffers"}  # its old name
    arguments: dict[str, Any] = {name: getattr(ddp, name) for name in names if hasattr(ddp, name)}
    if not ddp.bucket_bytes_cap_default:
        arguments["bucket_cap_mb"] = ddp.bucket_bytes_cap / 2**20
    module, training, comm_hooks = ddp.module, ddp.training, ddp._comm_hooks
    hooks = {
        name: getattr(ddp, name)
        for name in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_forward_hooks_with_kwargs",
            "_forward_pre_hooks_with_kwargs",
        )
    }
    ddp.logger = ddp.reducer = None  # type: ignore[assignment]  # its hooks on parameters go with it
    DistributedDataParallel.__init__(ddp, module, **arguments)
    for name, known in hooks.items():
        setattr(ddp, name, known)
    for hook, state in comm_hooks if ddp.mixed_precision is None else ():  # which registers its own
        ddp.register_comm_hook(state, hook)
    ddp.train(training)
