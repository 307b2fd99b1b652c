"""What a model costs dense and with layers removed: a training step, generation, memory, bytes of parameters."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

import gradpruner
from benchmarks.gpu.models import LLAMA_1B, LLAMA_8B, TINY, Shape, Steps, adapted, llama
from benchmarks.gpu.session import Session

NEW_TOKENS = 32
RATIO = 0.4
SWEPT = (0.2, 0.3, 0.4, 0.5, 0.6)
COSTS = ("step_s", "train_peak_bytes", "generate_s", "generate_peak_bytes", "parameter_bytes")


def dense_and_pruned(session: Session) -> None:
    """Llama-3.1-8B's shape, dense and with 40 % of its layers removed."""
    shape = TINY if session.tiny else LLAMA_8B
    dense = costs(session, shape, 0, steps=4 if session.tiny else 12)
    session.put(model="dense", shape=_named(shape), **dense)
    pruned = costs(session, shape, round(shape.layers * RATIO), steps=4 if session.tiny else 12)
    session.put(model="pruned", shape=_named(shape), **pruned)
    session.put(model="pruned / dense", **ratios(dense, pruned))


def sweep(session: Session) -> None:
    """Step time and memory over the share of layers removed."""
    shape = TINY if session.tiny else LLAMA_1B
    dense = costs(session, shape, 0, steps=4 if session.tiny else 10)
    session.put(model="dense", shape=_named(shape), removed_share=0.0, **dense)
    for ratio in SWEPT:
        count = round(shape.layers * ratio)
        pruned = costs(session, shape, count, steps=4 if session.tiny else 10)
        session.put(model=f"{count} of {shape.layers} removed", removed_share=count / shape.layers, **pruned)
        session.put(model=f"{count} of {shape.layers} removed / dense", **ratios(dense, pruned))


def costs(session: Session, shape: Shape, removed: int, steps: int) -> dict[str, Any]:
    """Of one model, made and thrown away: generation first, then training with LoRA. The first three steps warm up."""
    session.begin_peak()
    model = llama(session, shape)
    seconds_to_cut = 0.0
    if removed:
        plan = gradpruner.Plan(shape.layers, drop=list(range(shape.layers - 1 - removed, shape.layers - 1)))
        session.wait()
        began = time.perf_counter()
        model = gradpruner.apply(model, plan)
        session.wait()
        seconds_to_cut = time.perf_counter() - began
    session.begin_peak()
    generate_s = _generation(session, model.eval())
    generate_peak = session.peak()
    run = Steps(session, adapted(model), shape)
    session.begin_peak()
    seconds = run.run(steps)[3:]
    return {
        "layers": shape.layers - removed,
        "cut_s": seconds_to_cut,
        "step_s": statistics.median(seconds),
        "step_least_s": min(seconds),
        "step_most_s": max(seconds),
        "train_peak_bytes": session.peak(),
        "generate_s": generate_s,
        "generate_peak_bytes": generate_peak,
        "parameter_bytes": sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad),
    }


def ratios(dense: dict[str, Any], pruned: dict[str, Any]) -> dict[str, Any]:
    """The costs of one over those of the other, where both were measured."""
    return {name: pruned[name] / dense[name] for name in COSTS if dense[name]}


def _generation(session: Session, model: Any) -> float:
    ids = torch.randint(3, 190, (1, 16), generator=torch.Generator().manual_seed(0)).to(session.device)
    seconds = []
    with torch.no_grad():
        for _ in range(4):  # the first warms up
            session.wait()
            began = time.perf_counter()
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
            )
            session.wait()
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def _named(shape: Shape) -> str:
    return f"hidden {shape.hidden}, {shape.layers} layers, {shape.rows} x {shape.length} tokens"
