"""prune: probe, plan and apply in one call, on throw-away adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from gradpruner.errors import InvalidArgument
from gradpruner.model.decoder import Decoder
from gradpruner.model.modes import to_device
from gradpruner.model.wrappers import is_peft
from gradpruner.plan import Plan
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
    """Train LoRA adapters for up to `steps` batches, score the layers, and return the smaller model.

    batches: keyword arguments of the model with labels in them, as a data loader yields; one is one optimizer step.
    preset, and in settings what differs from it: see `Preset`. A PEFT model's own adapters are used, and treated as
    the new ones are: kept in the weights, or discarded. The plan is `.gradpruner_plan` of the result.
    Raises InvalidArgument, UnsupportedModel, ProbeError (no usable step; layers that cannot be compared by what is
    watched, before the first step); a plain model is then as it was.
    """
    if "rank_factor" in settings:
        raise InvalidArgument("rank_factor belongs to what trains the smaller model; prune only returns it")
    chosen = Preset.of(preset, **settings)
    recipe, wrapped = Recipe(), is_peft(model)
    check_removable(Decoder(model), chosen.adapters)  # better told now than after the probe
    trains = [(p, p.requires_grad) for p in model.parameters()]
    was_training = model.training
    watched = model if wrapped else add_adapters(model, recipe)
    try:
        igia, seen = _watch(watched.train(), batches, recipe, steps)
        plan: Plan = igia.plan(ratio, kind=chosen.kind, merge=chosen.merge)
        patches = fit_patches(watched, plan, seen) if chosen.patch else ()
        smaller = apply(
            watched, plan, igia, top=chosen.top, weight=chosen.weight, patches=patches, adapters=chosen.adapters
        )
    except BaseException:
        if not wrapped:
            watched.unload()  # type: ignore[operator]
            for parameter, flag in trains:
                parameter.requires_grad_(flag)
        watched.train(was_training)
        raise
    smaller.gradpruner_plan = plan  # type: ignore[assignment]
    return smaller.train(was_training)


def _watch(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], recipe: Recipe, steps: int
) -> tuple[Igia, list[Mapping[str, Any]]]:
    """What was seen, and the batches that it was seen on."""
    device = next(model.parameters()).device
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    probe, seen = Probe(model), list[Mapping[str, Any]]()
    with probe.watching(optimizer, steps):
        probe.check_comparable()
        for batch in batches:
            seen.append(batch)
            moved = to_device(batch, device)
            loss = model(**moved).loss
            if loss is None:
                raise InvalidArgument("batches: the model returned no loss; expected batches with labels")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            if len(seen) == steps:
                break
    if not seen:
        raise InvalidArgument("batches is empty; expected at least one")
    return probe.igia, seen
