"""`apply`: merge, patch and remove layers of a model in memory, all or nothing."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradpruner.checks import exact_share
from gradpruner.distributed.deepspeed import is_deepspeeds
from gradpruner.distributed.fsdp import refuse_flat, release_shards, reshard
from gradpruner.distributed.processes import Peers, peers_of, together
from gradpruner.errors import InvalidArgument, ModelMismatch, UnsupportedModel
from gradpruner.model.decoder import Decoder, Weight, is_packed
from gradpruner.model.hidden_states import skipping
from gradpruner.model.logits import differ, log_unchecked_windows, logits_of, longer_input
from gradpruner.model.wrappers import peft_of, root_of
from gradpruner.plan import Plan
from gradpruner.presets import Preset
from gradpruner.probe.igia import Igia
from gradpruner.probe.importance import SharedImportance
from gradpruner.pruning.adapter_removal import check_removable, check_unaltered, remove_adapters
from gradpruner.pruning.adapters import adapters_off, casting_inputs, keeping_scales
from gradpruner.pruning.merge import merge_into
from gradpruner.pruning.patch import Patch, add_patch, check_patches
from gradpruner.pruning.prepared_surgery import ReplacedParameter
from gradpruner.pruning.surgery import prepare

logger = logging.getLogger(__name__)


def apply(
    model: nn.Module,
    plan: Plan,
    igia: Igia | None = None,
    *,
    preset: str = "default",
    top: float | None = None,
    weight: float | None = None,
    patches: Sequence[Patch] = (),
    adapters: str | None = None,
    layers: str | nn.ModuleList | None = None,
) -> nn.Module:
    """Remove the layers that a plan removes, and return the smaller model.

    Nothing is changed unless everything succeeds. The removal is first planned against the configuration. Then the
    logits of the smaller model are compared with those of the dense model with the same layers skipped.

    The base transformers model is returned, and it stays the same object. If it had adapters, all of its parameters are
    trainable afterwards. Otherwise `requires_grad` stays as it was. An optimizer that was made before still holds the
    removed parameters: see `rebuild_optimizer`, or use `cut`.

    In several processes, all of them call it. A model that FSDP2 shards is merged shard by shard and stays sharded;
    without adapters, it can go on training. If FSDP2's root was the PeftModel, it is gone with the adapters, and the
    result is for `save` only.

    Args:
        model: a transformers model or a PEFT model.
        plan: which layers are removed and merged.
        igia: importance of the entries of the weights. None if the plan merges nothing.
        preset: "default" or "paper": decides `top`, `weight` and `adapters` where they are not given.
        top: share of the entries of each merged weight that is used, above 0 and up to 1. The most important entries
            are used. 0.2 in both presets.
        weight: factor of the merged entries. 1 in both presets.
        patches: those that `fit_patches` returned for this plan. No patch is fitted here.
        adapters: what happens to the adapters of a PEFT model. "keep" adds what they learned to the weights (preset
            "default"). "discard" throws them away, with the trained copies of `modules_to_save` (preset "paper"). A
            model without adapters accepts both. Adapters that hold a part of the base weights are refused (PiSSA,
            OLoRA, CorDA, LoftQ, LoRA-GA, KaSA), and so are merged ones.
        layers: path of the ModuleList of decoder layers, or the list itself, for a model that is not Hugging Face's.

    Returns:
        The smaller model, without adapters.

    Raises:
        InvalidArgument: an argument is not accepted, or the plan merges and `igia` has no importance of its layers.
        ModelMismatch: plan or igia was made for another model.
        UnsupportedModel: the layers cannot be removed, or the adapters cannot be treated as asked.

    Example:
        patches = gradpruner.fit_patches(model, plan, batches)
        model = gradpruner.apply(model, plan, patches=patches)

    Source: docs/method.md, sections 3 to 5.
    """
    settings = Preset.of(preset, top=top, weight=weight, adapters=adapters)
    share, decoder = exact_share("top", settings.top), Decoder(model, layers)
    check_removable(decoder, settings.adapters)
    acting = peft_of(model) if settings.adapters == "keep" else None
    with removing(decoder, plan, igia, share, settings.weight, patches, acting=acting) as removal:
        remove_adapters(decoder, settings.adapters, removal.logits, removal.tokens)
    return decoder.base


class Removal(NamedTuple):
    """A model while its removal can still be undone.

    Args:
        logits: what the model must give once the adapters are where they belong, float32, or None where it gives none.
        tokens: length of the longer input of these logits, see `logits_of`.
        replaced: parameters outside the layers whose place smaller ones have taken. An optimizer must exchange them.
    """

    logits: Tensor | None
    tokens: int
    replaced: tuple[ReplacedParameter, ...]


@contextlib.contextmanager
def removing(
    decoder: Decoder,
    plan: Plan,
    igia: Igia | None,
    share: Fraction,
    weight: float,
    patches: Sequence[Patch] = (),
    *,
    acting: Any = None,
) -> Iterator[Removal]:
    """Merge, patch and remove layers. Inside the block the model is cut.

    If anything fails, here or inside the block, all is undone. Adapters of kept layers stay.

    Args:
        decoder: the model.
        plan: which layers are removed and merged.
        igia: importance for the merges, or None.
        share: share of the entries of each merged weight that is used.
        weight: factor of the merged entries.
        patches: patches of gaps of this plan.
        acting: the PeftModel whose adapters still act afterwards. The logits are then compared with adapters too.

    Yields:
        The logits that the finished model must give, and the parameters that were replaced.

    Raises:
        InvalidArgument: as `apply`.
        ModelMismatch: as `apply`.
        UnsupportedModel: as `apply`.
    """
    # 1. Refuse what cannot be changed in place, and what does not fit together. Nothing is changed up to step 3.
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
    # 2. Plan the removal.
    surgery = prepare(decoder, plan.kept)
    removed, dtype = [decoder.layers[i] for i in plan.removed], next(decoder.base.parameters()).dtype
    undo_values: list[tuple[Tensor, Tensor]] = []
    undo_cut = None
    try:
        # 3. Merge into the kept weights, then add the patches.
        with torch.no_grad(), _scales_kept(acting, undo_values, changes=bool(plan.merge or patches)):
            for target, donors in plan.donors.items():
                assert igia is not None
                for kept in [w for w in decoder.weights if w.layer == target]:
                    merge_into(decoder, kept, donors, igia, share, weight, undo_values)
            for patch in patches:
                add_patch(decoder, patch, undo_values)
        # 4. Note the logits that the smaller model must have: without adapters, and with those that still act.
        tokens = longer_input(decoder.config)
        expected = skipping_logits(decoder, plan.removed, tokens)
        log_unchecked_windows(decoder.config)
        if expected is None:
            logger.warning("the model gives no logits on token ids alone: those of the smaller model are not compared")
        expected_acting = expected if acting is None else skipping_logits(decoder, plan.removed, tokens, adapters=True)
        # 5. Remove the layers.
        undo_cut, replaced = surgery.perform()
        # 6. Compare.
        actual = skipping_logits(decoder, (), tokens)
        actual_acting = actual if acting is None else skipping_logits(decoder, (), tokens, adapters=True)
        with together(_peers_of(root, igia)):
            _check_logits(expected, actual, dtype)
            _check_logits(expected_acting, actual_acting, dtype)
        # 7. Let the caller go on with the cut model.
        yield Removal(expected_acting, tokens, replaced)
    except BaseException:
        if undo_cut is not None:
            undo_cut()
        for parameter, before in reversed(undo_values):  # a weight may have been merged, then patched
            parameter.copy_(before)
        raise
    # 8. Give the memory of removed shards back.
    if root is not None:
        release_shards(root, removed)


def check_fits(
    decoder: Decoder, plan: Plan, igia: Igia | None, samples: Callable[[Weight], Tensor] | None = None
) -> None:
    """Check that plan and igia were made for this model, and that its layers can be merged.

    Args:
        decoder: the model.
        plan: the plan.
        igia: the igia, or None if the plan merges nothing.
        samples: reads values of a weight, for a model on the meta device; see `Decoder.fingerprint`.

    Raises:
        InvalidArgument: this is no plan, it removes nothing, or the importance that it needs is missing.
        ModelMismatch: plan or igia was made for another model.
        UnsupportedModel: layers that differ in structure, are quantised or have no values cannot be merged.
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
            if weight.layer not in (target, *donors):
                continue
            parameter = decoder.parameter(weight)
            if is_packed(parameter):
                raise UnsupportedModel(
                    f"layer {weight.layer} {weight.name} is quantised: merge into the full-precision checkpoint instead"
                )
            if parameter.is_meta and samples is None:
                raise UnsupportedModel(f"layer {weight.layer} {weight.name} is on the meta device: it has no values")


def skipping_logits(
    decoder: Decoder, skip: tuple[int, ...], tokens: int | None = None, *, adapters: bool = False
) -> Tensor | None:
    """Compute the logits of the model with some layers skipped: each returns its input.

    A model that FSDP2 shards is called through its root, and every process calls this function.

    Args:
        decoder: the model.
        skip: the skipped layers.
        tokens: length of the longer input, see `logits_of`.
        adapters: whether the adapters act. Default: they do not.

    Returns:
        The logits as `logits_of` gives them, None where the model gives none on token ids alone.
    """
    acting = casting_inputs(decoder.base) if adapters else adapters_off(decoder.base)
    with skipping(decoder, skip), acting:
        return logits_of(root_of(decoder.given) or decoder.base, tokens)


def _scales_kept(
    acting: Any, undo: list[tuple[Tensor, Tensor]], *, changes: bool
) -> contextlib.AbstractContextManager[None]:
    """Keep the scales of DoRA where adapters still act and the weights beside them change."""
    return keeping_scales(acting, undo) if acting is not None and changes else contextlib.nullcontext()


def _peers_of(root: nn.Module | None, igia: Igia | None) -> Peers | None:
    """The processes that are known to remove the same layers: they succeed or fail together."""
    if igia is not None and isinstance(igia.importance, SharedImportance):
        return igia.importance.peers
    return None if root is None else peers_of()


def _check_logits(expected: Tensor | None, actual: Tensor | None, dtype: torch.dtype) -> None:
    difference = differ(expected, actual, dtype)
    if difference is not None:
        raise UnsupportedModel(
            "the smaller model's logits are not those of the dense model with the same layers skipped (by "
            f"{difference:.3g}): the model depends on its layers in a way its configuration does not show; nothing was "
            "changed"
        )
