"""apply: fold, remove, renumber. In place, all or nothing."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradpruner.checks import exact_share
from gradpruner.distributed.deepspeed import is_deepspeeds
from gradpruner.distributed.fsdp import refuse_flat, release_shards, reshard
from gradpruner.distributed.processes import Peers, peers_of, together
from gradpruner.distributed.sharding import local, rows_of
from gradpruner.errors import InvalidArgument, ModelMismatch, UnsupportedModel
from gradpruner.model.decoder import Decoder, Weight, is_packed
from gradpruner.model.hidden_states import pass_input_on
from gradpruner.model.logits import differ, log_unchecked_windows, logits_of, longer_input
from gradpruner.model.wrappers import peft_of, root_of
from gradpruner.plan import Plan
from gradpruner.probe.igia import Igia
from gradpruner.probe.importance import SharedImportance
from gradpruner.pruning.adapter_removal import check_removable, check_unaltered, take_off
from gradpruner.pruning.adapters import _adapters_off, _casting_inputs, keeping_scales
from gradpruner.pruning.merge import _fold
from gradpruner.pruning.patch import Patch, check_patches
from gradpruner.pruning.surgery import Replaced, prepare

logger = logging.getLogger(__name__)


def apply(
    model: nn.Module,
    plan: Plan,
    igia: Igia | None = None,
    *,
    top: float = 0.2,
    weight: float = 1.0,
    patches: Sequence[Patch] = (),
    adapters: str = "discard",
    layers: str | nn.ModuleList | None = None,
) -> nn.Module:
    """Fold the plan's merged layers into kept ones, remove what the plan removes, and return the smaller model.

    model: plain or PEFT; the base transformers model comes back, the same object, all of its parameters trainable, as
    from_pretrained gives them. adapters: "discard" them and the trained copies of modules_to_save (P, C), or "keep"
    what they learned, added to the weights of the layers that stay. Adapters that keep a part of the base weights in
    themselves (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, KaSA), or are merged into them, are refused. igia may be None when
    the plan merges nothing.
    top: share p of each merged weight's entries to keep, the most important ones (C: 0.2). weight: factor of
    the merged entries (P, C: 1). patches: of `fit_patches`, for gaps of this plan. Source: docs/method.md, section 3.

    Nothing is changed unless everything succeeds: the removal is planned against the configuration first, and the
    logits of the smaller model are compared with those of the dense one with the same layers skipped. An
    optimizer made before holds parameters that are gone: see `rebuild_optimizer`, or use `cut`.

    In several processes all of them call it. A model sharded by FSDP2 is merged shard by shard, and stays sharded; one
    without adapters can go on training. If FSDP2's root was the PeftModel, what comes back is for `save` only: its
    root is gone with the adapters.
    Raises InvalidArgument, ModelMismatch, UnsupportedModel.
    """
    decoder = Decoder(model, layers)
    check_removable(decoder, adapters)
    acting = peft_of(model) if adapters == "keep" else None
    with removing(decoder, plan, igia, exact_share("top", top), weight, patches, acting=acting) as removal:
        take_off(decoder, adapters, removal.logits, removal.tokens)
    return decoder.base


class Removal(NamedTuple):
    """A model while its removal can still be undone.

    logits: those that are to be seen once the adapters are where they belong, float32 or None where the model gives
    none. tokens: of the longer input that they were computed on, see `logits_of`. replaced: the parameters outside the
    layers whose place smaller ones have taken, for whoever holds them.
    """

    logits: Tensor | None
    tokens: int
    replaced: list[Replaced]


@contextlib.contextmanager
def removing(
    decoder: Decoder,
    plan: Plan,
    igia: Igia | None,
    share: Fraction,
    weight: float,
    patches: Sequence[Patch] = (),
    *,
    acting: nn.Module | None = None,
) -> Iterator[Removal]:
    """Fold, patch, remove layers in the base model, whatever wraps it; adapters of kept layers stay.

    Inside, the model is cut; all is undone if anything fails, here or inside. acting: the PeftModel whose adapters act
    to the end: the logits to be seen there are with these adapters, or without any.
    """
    refuse_flat(decoder.given)
    if any(map(is_deepspeeds, decoder.given.parameters())):
        raise UnsupportedModel(
            "a DeepSpeed engine holds the model, with copies of its weights in the optimizer: apply plan and igia to "
            "the model before it gets an engine, or to its checkpoint (apply_folder)"
        )
    root = root_of(decoder.given)
    if root is not None:
        reshard(root)  # what is merged into a gathered parameter would be lost
    check_fits(decoder, plan, igia)
    check_patches(decoder, plan, patches)
    surgery = prepare(decoder, plan.kept)
    removed = [decoder.layers[i] for i in plan.removed]
    undo_merge: list[tuple[Tensor, Tensor]] = []
    undo_cut = None
    adds, dtype = bool(plan.merge or patches), next(decoder.base.parameters()).dtype
    scales = keeping_scales(acting, undo_merge) if acting is not None and adds else contextlib.nullcontext()
    try:
        with torch.no_grad(), scales:
            for target, donors in plan.donors.items():
                assert igia is not None
                for kept in [w for w in decoder.weights if w.layer == target]:
                    _fold(decoder, kept, donors, igia, share, weight, undo_merge)
            for patch in patches:
                _add(decoder, patch, undo_merge)
        tokens = longer_input(decoder.config)
        expected = skipping_logits(decoder, plan.removed, tokens)
        log_unchecked_windows(decoder.config)
        if expected is None:
            logger.warning("the model gives no logits on token ids alone: those of the smaller model are not compared")
        acted = expected if acting is None else skipping_logits(decoder, plan.removed, tokens, adapters=True)
        undo_cut = surgery.perform()
        actual = skipping_logits(decoder, (), tokens)
        acts = actual if acting is None else skipping_logits(decoder, (), tokens, adapters=True)
        with together(_peers_of(root, igia)):
            _check_logits(expected, actual, dtype)
            _check_logits(acted, acts, dtype)
        yield Removal(acted, tokens, surgery.replaced)
    except BaseException:
        if undo_cut is not None:
            undo_cut()
        for parameter, before in reversed(undo_merge):  # a weight may have been merged, then patched
            parameter.copy_(before)
        raise
    if root is not None:
        release_shards(root, removed)


def _peers_of(root: nn.Module | None, igia: Igia | None) -> Peers | None:
    """The processes that remove the same layers, where they are known to: to succeed or to fail all together."""
    if igia is not None and isinstance(igia.importance, SharedImportance):
        return igia.importance.peers
    return None if root is None else peers_of()


def check_fits(
    decoder: Decoder, plan: Plan, igia: Igia | None, samples: Callable[[Weight], Tensor] | None = None
) -> None:
    """Check that plan and igia were made for this model, and that it can be merged as the plan says.

    samples: for a model on the meta device whose values are elsewhere, see `Decoder.fingerprint`.
    Raises InvalidArgument, ModelMismatch, UnsupportedModel.
    """
    if not isinstance(plan, Plan):
        raise InvalidArgument(f"plan is a {type(plan).__name__}; expected a gradpruner.Plan")
    if plan.layers != len(decoder.layers):
        raise ModelMismatch(f"the plan is for {plan.layers} decoder layers; the model has {len(decoder.layers)}")
    if not plan.removed:
        raise InvalidArgument("the plan removes no layer")
    check_unaltered(decoder)
    if plan.model is not None:
        decoder.check_fingerprint(plan.model, "the plan", samples)
    if igia is not None and (plan.model is None or igia.model != plan.model):
        decoder.check_fingerprint(igia.model, "the igia", samples)
    if not plan.merge:
        return
    if igia is None:
        raise InvalidArgument(f"igia is None; the plan merges layers {sorted(plan.merge)} and needs their importance")
    for target, donors in plan.donors.items():
        for donor in donors:
            if decoder.structure(donor) != decoder.structure(target):
                raise UnsupportedModel(f"layer {donor} differs in structure from layer {target}: they cannot be merged")
            if not any(layer == donor for layer, _ in igia.importance):
                raise InvalidArgument(f"igia holds no element importance of layer {donor}, which the plan merges")
        for weight in decoder.weights:
            if weight.layer in (target, *donors) and is_packed(decoder.parameter(weight)):
                raise UnsupportedModel(
                    f"layer {weight.layer} {weight.name} is quantised: merge into the full-precision checkpoint instead"
                )
            if weight.layer in (target, *donors) and decoder.parameter(weight).is_meta and samples is None:
                raise UnsupportedModel(f"layer {weight.layer} {weight.name} is on the meta device: it has no values")


def _add(decoder: Decoder, patch: Patch, undo: list[tuple[Tensor, Tensor]]) -> None:
    stored = decoder.parameter(patch.weight).data
    rows, parameter = rows_of(stored), local(stored)
    change = patch.change if rows is None else patch.change[rows[0] : sum(rows)]
    undo.append((parameter, parameter.to("cpu", copy=True)))
    exact = torch.promote_types(parameter.dtype, change.dtype)  # float64 stays that
    parameter.copy_(parameter.to(exact) + change.to(parameter.device, exact))


def skipping_logits(
    decoder: Decoder, skip: tuple[int, ...], tokens: int | None = None, *, adapters: bool = False
) -> Tensor | None:
    """Logits of the model, each layer in `skip` passing its input on as its output. adapters: whether they act.
    tokens: see `logits_of`.

    A model that FSDP2 shards is asked through its root; every process calls this.
    """
    root = root_of(decoder.given)
    handles = [decoder.layers[i].register_forward_hook(pass_input_on, with_kwargs=True) for i in skip]
    try:
        with _casting_inputs(decoder.base) if adapters else _adapters_off(decoder.base):
            return logits_of(root or decoder.base, tokens)
    finally:
        for handle in handles:
            handle.remove()


def _check_logits(expected: Tensor | None, actual: Tensor | None, dtype: torch.dtype) -> None:
    gap = differ(expected, actual, dtype)
    if gap is not None:
        raise UnsupportedModel(
            f"the smaller model's logits are not those of the dense model with the same layers skipped (by {gap:.3g}): "
            "the model depends on its layers in a way its configuration does not show; nothing was changed"
        )
