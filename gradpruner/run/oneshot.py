"""`prune`: probe, plan and apply in one call, on throw-away adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from gradpruner.errors import InvalidArgument
from gradpruner.model.decoder import Decoder
from gradpruner.model.modes import to_device
from gradpruner.model.wrappers import is_peft
from gradpruner.presets import Preset
from gradpruner.probe.igia import Igia
from gradpruner.probe.probe import Probe
from gradpruner.pruning.adapter_removal import check_removable
from gradpruner.pruning.apply import apply
from gradpruner.pruning.patch import fit_patches
from gradpruner.training.finetune import add_adapters
from gradpruner.training.recipe import Recipe


def prune(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    ratio: float = 0.4,
    steps: int = 40,
    preset: str = "default",
    **settings: Any,
) -> nn.Module:
    """Train LoRA adapters for a few batches, score the layers, and return the smaller model.

    The model is changed in place. After an error, a plain model is as it was.

    Args:
        model: a transformers model, or a PEFT model. The adapters of a PEFT model are used and treated as new ones
            would be: kept in the weights, or discarded.
        batches: keyword arguments of the model with labels in them, as a data loader yields them. Each batch is one
            optimizer step.
        ratio: share of the layers to remove, above 0 and below 1. Default 0.4.
        steps: how many batches are used at most. Default 40.
        preset: how layers are chosen and cut, "default" or "paper".
        **settings: single settings that differ from the preset, see `gradpruner.presets.Preset`. `rank_factor` is not
            accepted.

    Returns:
        The smaller model: `model` itself, or the base model of a PEFT model. It has no adapters, and all of its
        parameters are trainable. Its plan is the attribute `gradpruner_plan`.

    Raises:
        InvalidArgument: an argument is not accepted, or `batches` is empty or has no labels.
        UnsupportedModel: layers cannot be removed from the model.
        ProbeError: no step was usable, or the layers cannot be compared by what the probe watches. The latter is known
            before the first step.

    Example:
        smaller = gradpruner.prune(model, batches, ratio=0.4)
        gradpruner.save(smaller, "small", tokenizer=tokenizer, plan=smaller.gradpruner_plan)
    """
    if "rank_factor" in settings:
        raise InvalidArgument("rank_factor belongs to what trains the smaller model; prune only returns it")
    options = Preset.of(preset, **settings)
    recipe, has_adapters = Recipe(), is_peft(model)
    check_removable(Decoder(model), options.adapters)  # before the probe takes its time
    grad_flags = [(p, p.requires_grad) for p in model.parameters()]
    was_training = model.training
    watched = model if has_adapters else add_adapters(model, recipe)
    try:
        igia, used_batches = _probe(watched.train(), batches, recipe, steps)
        plan = igia.plan(ratio, kind=options.kind, merge=options.merge)
        patches = fit_patches(watched, plan, used_batches) if options.patch else ()
        smaller = apply(
            watched, plan, igia, top=options.top, weight=options.weight, patches=patches, adapters=options.adapters
        )
    except BaseException:
        if not has_adapters:
            watched.unload()  # type: ignore[operator]
            for parameter, flag in grad_flags:
                parameter.requires_grad_(flag)
        watched.train(was_training)
        raise
    smaller.gradpruner_plan = plan  # type: ignore[assignment]
    return smaller.train(was_training)


def _probe(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], recipe: Recipe, steps: int
) -> tuple[Igia, list[Mapping[str, Any]]]:
    """Train on up to `steps` batches with a probe. Return its igia and the batches used."""
    device = next(model.parameters()).device
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    probe, used_batches = Probe(model), list[Mapping[str, Any]]()
    with probe.watching(optimizer, steps):
        probe.check_comparable()
        for batch in batches:
            used_batches.append(batch)
            loss = model(**to_device(batch, device)).loss
            if loss is None:
                raise InvalidArgument("batches: the model returned no loss; expected batches with labels")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            if len(used_batches) == steps:
                break
    if not used_batches:
        raise InvalidArgument("batches is empty; expected at least one")
    return probe.igia, used_batches
