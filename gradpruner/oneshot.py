"""prune: probe, plan and apply in one call, on throw-away adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from gradpruner.decoder import is_peft
from gradpruner.errors import InvalidArgument
from gradpruner.finetune import Recipe, add_adapters
from gradpruner.igia import Igia
from gradpruner.merge import apply
from gradpruner.plan import Plan
from gradpruner.probe import Probe


def prune(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    ratio: float = 0.4,
    steps: int = 40,
    kind: str = "squared",
    merge: str | int = "auto",
    top: float = 0.2,
) -> nn.Module:
    """Train throw-away LoRA adapters for up to `steps` batches, score the layers, and return the smaller model.

    batches: keyword arguments of the model with labels in them, as a data loader yields; one is one optimizer step.
    A PEFT model's own adapters are used, and discarded like the throw-away ones. The plan is `.gradpruner_plan` of
    the result. Raises InvalidArgument, UnsupportedModel, ProbeError (no usable step); a plain model is then as it was.
    """
    recipe, wrapped = Recipe(), is_peft(model)
    trains = [(p, p.requires_grad) for p in model.parameters()]
    watched = model if wrapped else add_adapters(model, recipe)
    was_training = watched.training
    try:
        igia = _watch(watched.train(), batches, recipe, steps)
        plan: Plan = igia.plan(ratio, kind=kind, merge=merge)
        smaller = apply(watched, plan, igia, top=top)
    except BaseException:
        if not wrapped:
            watched.unload()  # type: ignore[operator]
            for parameter, flag in trains:
                parameter.requires_grad_(flag)
        watched.train(was_training)
        raise
    smaller.gradpruner_plan = plan  # type: ignore[assignment]
    return smaller.train(was_training)


def _watch(model: nn.Module, batches: Iterable[Mapping[str, Any]], recipe: Recipe, steps: int) -> Igia:
    device = next(model.parameters()).device
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    probe, seen = Probe(model), 0
    with probe.watching(optimizer, steps):
        for seen, batch in enumerate(batches, 1):
            moved = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
            loss = model(**moved).loss
            if loss is None:
                raise InvalidArgument("batches: the model returned no loss; expected batches with labels")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            if seen == steps:
                break
    if not seen:
        raise InvalidArgument("batches is empty; expected at least one")
    return probe.igia
