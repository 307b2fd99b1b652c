"""One way of fine-tuning at a time: trained for a few steps under the probe, then checked against plain arithmetic.

`run(case)` builds a tiny random model, trains it, writes down every gradient just before optimizer.step(), and compares
the probe's scores, the merged weights and the smaller model with what tests/support/oracle.py makes of those gradients.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from adapter_models import (
    DONOR,
    KEPT,
    LAYERS,
    REMOVED,
    STEPS,
    TARGET,
    Case,
    Row,
    bare,
    batch,
    is_transposed,
    layers_of,
    linears_of,
    plain,
    trained,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import gradpruner


@dataclass
class Seen:
    """Gradients as they were before each optimizer step: by step, layer and name, (gA, gB), float64, unscaled."""

    steps: list[list[dict[str, tuple[Tensor, Tensor]]]] = field(default_factory=list)

    def scores(self, kind: str) -> list[float]:
        return oracle.layer_scores([[list(layer.values()) for layer in step] for step in self.steps], kind)

    def importance(self, layer: int, name: str, beta2: float | None) -> Tensor | None:
        """F, or with beta2 Adam's memory of it."""
        squares = [oracle.importance(*(t[None] for t in s[layer][name])) for s in self.steps if name in s[layer]]
        if not squares:
            return None
        if beta2 is None:
            return sum(squares)
        f = torch.zeros_like(squares[0])
        for square in squares:
            f = beta2 * f + (1 - beta2) * square
        return f


def gradients(base: Any, names: list[str], active: tuple[str, ...], scale: float) -> list[dict[str, Any]]:
    """This step's (gA, gB) by layer and name; of a weight that trains itself gA is its gradient, gB the identity."""
    step = []
    for layer in layers_of(base):
        pairs = {}
        for name in names:
            module = layer.get_submodule(name)
            if hasattr(module, "lora_A"):
                found = [
                    (module.lora_A[a].weight.grad, module.lora_B[a].weight.grad) for a in active if a in module.lora_A
                ]
                found = [pair for pair in found if pair[0] is not None]
                if found:
                    pairs[name] = tuple(torch.cat([p[i].double() / scale for p in found], i) for i in (0, 1))
            elif module.weight.grad is not None:
                g = module.weight.grad.double() / scale
                g = g.T if is_transposed(base) else g
                pairs[name] = g.clone(), torch.eye(g.shape[0], dtype=torch.float64)
        step.append(pairs)
    return step


class Observed:
    """The same of frozen weights under any adapters: dY^T X of the base layer's own product, in float64."""

    def __init__(self, base: Any, names: list[str]) -> None:
        self.sums: list[dict[str, Tensor]] = [{} for _ in layers_of(base)]
        self.handles = [
            bare(layer.get_submodule(name)).register_forward_hook(self.hook(j, name))
            for j, layer in enumerate(layers_of(base))
            for name in names
        ]

    def hook(self, layer: int, name: str) -> Callable[..., None]:
        def forward(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            x = args[0].detach().double().flatten(0, -2)

            def backward(dy: Tensor) -> None:
                g = dy.double().flatten(0, -2).T @ x
                self.sums[layer][name] = self.sums[layer].get(name, 0) + g

            if output.requires_grad:
                output.register_hook(backward)

        return forward

    def take(self) -> list[dict[str, Any]]:
        step = [{n: (g, torch.eye(len(g), dtype=torch.float64)) for n, g in layer.items()} for layer in self.sums]
        for layer in self.sums:
            layer.clear()
        return step


def train(case: Case, model: nn.Module, names: list[str]) -> tuple[gradpruner.Igia, Seen]:
    loop, seen, raw = case.loop, Seen(), getattr(model, "_orig_mod", model)
    optimizer = case.optimizer(raw)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=loop.scaler is not None)
    probe = gradpruner.Probe(model, estimator=case.estimator)
    watching = contextlib.nullcontext() if loop.record else probe.watching(optimizer, STEPS + loop.overflow)
    precision = torch.autocast("cpu", loop.autocast) if loop.autocast else contextlib.nullcontext()
    model.train()
    observed = Observed(plain(raw), names) if case.estimator == "exact" else None
    with watching:
        for i in range(STEPS + loop.overflow):
            bad = loop.overflow and i == 1
            seeds = [100 * i + micro for micro in range(loop.micro_batches)]
            loop.switch(raw, i)
            for seed in seeds:
                with precision:
                    loss = model(input_ids=batch(seed), labels=batch(seed), **case.inputs()).loss / loop.micro_batches
                scaler.scale(loss * float("inf") if bad else loss).backward()
            if loop.scaler == "unscaled":
                scaler.unscale_(optimizer)
            if loop.clip is not None and loop.scaler != "fused":
                torch.nn.utils.clip_grad_norm_(trained(raw), loop.clip)
            if observed is not None:
                seen.steps.append(observed.take())
            elif not bad:
                scale = scaler.get_scale() if loop.scaler == "fused" else 1.0
                seen.steps.append(gradients(plain(raw), names, case.active, scale))
            if loop.record:
                probe.record(optimizer)
            if loop.scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            optimizer.zero_grad()
    for handle in observed.handles if observed else ():
        handle.remove()
    return probe.igia, seen


def check_scores(case: Case, igia: gradpruner.Igia, seen: Seen) -> str:
    assert igia.estimator == case.found and igia.steps == STEPS
    for kind in ("squared", "norm", "normalized"):
        got, want = igia.layer_scores(kind).tolist(), seen.scores(kind)
        rel = 1e-4 if case.found == "exact" else case.rel  # of the one the products are in float32
        assert got == pytest.approx(want, rel=rel), kind
    if case.uneven:
        with pytest.raises(gradpruner.ProbeError, match="cannot be compared"):
            igia.plan(count=3, kind="squared", merge=1)
        return f"{len(igia.weights)} weights, no plan"
    chosen = igia.plan(count=3, kind="squared", merge=1)
    scores = seen.scores("squared")
    lowest = sorted(range(1, LAYERS), key=lambda j: (scores[j], -j))[:3]
    assert sorted(chosen.removed) == sorted(lowest), (chosen, scores)
    return f"{len(igia.weights)} weights"


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters(remove_duplicate=False)}


def skipping(dense: Any, ids: Tensor) -> Tensor:
    """Logits of the dense model with the removed layers passing their input on."""
    layers = [layers_of(dense)[index] for index in REMOVED]
    for layer in layers:
        layer.forward = passing_on(layer.forward)
    try:
        with torch.no_grad():
            return dense.eval()(input_ids=ids, use_cache=False).logits
    finally:
        for layer in layers:
            del layer.forward


def passing_on(whole: Callable[..., Any]) -> Callable[..., Any]:
    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = whole(hidden, *args, **kwargs)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    return forward


def check_smaller(small: Any, dense: Any, changed: dict[str, Tensor]) -> None:
    """Every parameter bit for bit the dense model's own, or the changed one; and the logits."""
    dense = copy.deepcopy(dense)
    with torch.no_grad():
        for name, value in changed.items():
            layers_of(dense)[TARGET].get_parameter(name).copy_(value)
    path = "transformer.h" if is_transposed(dense) else "model.layers"
    wanted = state(dense)
    now = state(small)
    renamed = {}
    for name, value in wanted.items():
        if name.startswith(path):
            index, _, rest = name.removeprefix(f"{path}.").partition(".")
            if int(index) not in KEPT:
                continue
            name = f"{path}.{KEPT.index(int(index))}.{rest}"
        renamed[name] = value
    assert now.keys() == renamed.keys()
    assert [name for name in now if not torch.equal(now[name], renamed[name])] == []
    assert type(small) is type(dense) and small.config.num_hidden_layers == len(layers_of(small)) == len(KEPT)
    assert all(p.requires_grad for p in small.parameters() if p.is_floating_point())
    ids = batch(7)
    with torch.no_grad():
        got = small.eval()(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, skipping(dense, ids))


def merge(weight: Tensor, donor: Tensor, mask: Tensor) -> Tensor:
    """oracle.merge of one donor, all entries at once."""
    added = mask & (donor.sign() == weight.sign()) & (weight != 0)
    return (weight.float() + torch.where(added, donor, 0).float()).to(weight.dtype)


def merged_weights(case: Case, seen: Seen, before: Any, small: Any, names: list[str]) -> tuple[dict[str, Tensor], str]:
    """The kept layer's weights as they have become, each entry compared with the oracle's merge."""
    changed = {}
    beta2 = 0.999 if case.found == "adam" else None
    for name in names:
        f = seen.importance(DONOR, name, beta2)
        if f is None:
            continue
        weight, donor = (bare(layers_of(before)[j].get_submodule(name)).weight.detach() for j in (TARGET, DONOR))
        f = f.T.contiguous() if is_transposed(before) else f
        k = f.numel() * 2 // 10
        want = merge(weight, donor, oracle.mask_of(f, k))
        got = layers_of(small)[KEPT.index(TARGET)].get_submodule(name).weight.detach()
        edge = f.flatten().sort(descending=True).values[k - 1]
        border = (f - edge).abs() <= 1e-5 * edge  # either side is right for these
        assert not ((got != want) & ~border).any(), name
        assert not ((got != want) & (got != weight) & (got != weight + donor)).any(), name
        assert (want != weight).any(), name
        changed[f"{name}.weight"] = got.clone()
    assert changed
    return changed, f"{len(changed)} weights"


def refused(case: Case, row: Row, when: str, action: Callable[[], Any]) -> bool:
    """Whether the case is refused here, as it should be; then the row says why."""
    if case.refused is None or case.refused.when != when:
        return False
    with pytest.raises(gradpruner.GradPrunerError) as caught:
        action()
    assert type(caught.value) is case.refused.error, caught.value
    reason = case.refused.reason or str(caught.value)
    assert reason in str(caught.value)
    row.result = f"refused: {reason}"
    return True


def run(case: Case) -> Row:
    """All checks of one case. Raises AssertionError where one fails."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as scratch:
        warnings.simplefilter("ignore")
        return quantised(case, Path(scratch)) if case.quantise else unquantised(case)


def unquantised(case: Case) -> Row:
    row = Row()
    base = case.base()
    original, names = copy.deepcopy(base), linears_of(base)
    torch.manual_seed(1)
    model = case.adapt(base)
    if case.loop.compiled:
        torch._dynamo.reset()
        model = torch.compile(model, backend=case.loop.compiled)
    if refused(case, row, "probe", lambda: train(case, model, names)[0].layer_scores()):
        return row
    igia, seen = train(case, model, names)
    row.scores = check_scores(case, igia, seen)
    adapted = hasattr(getattr(model, "_orig_mod", model), "peft_config")
    dense = original if adapted else copy.deepcopy(plain(model))
    case.after(model)
    plan = gradpruner.Plan(LAYERS, drop=[1, 4], merge=[DONOR], model=igia.model)
    before = state(model)
    if refused(case, row, "apply", lambda: gradpruner.apply(model, plan, igia, adapters="discard")):
        assert all(torch.equal(value, before[name]) for name, value in state(model).items())
        model = copy.deepcopy(original)  # what the refusal says to do
    small = gradpruner.apply(model, plan, igia, adapters="discard")
    changed, row.merged = merged_weights(case, seen, dense, small, names)
    check_smaller(small, dense, changed)
    torch.manual_seed(1)
    fresh = case.base() if row.result != "works" else case.adapt(case.base())
    check_smaller(gradpruner.apply(fresh, gradpruner.Plan(LAYERS, drop=REMOVED), adapters="discard"), original, {})
    row.dropped = "logits"
    return row


def quantised(case: Case, folder: Path) -> Row:
    """The probe on the quantised model; merged on the full-precision checkpoint, dropped in place."""
    row = Row()
    original = case.base()
    names = linears_of(original)
    original.save_pretrained(folder / "full")
    base = AutoModelForCausalLM.from_pretrained(
        folder / "full", quantization_config=case.quantise(), device_map={"": "cpu"}
    )
    torch.manual_seed(1)
    model = case.adapt(base)
    igia, seen = train(case, model, names)
    row.scores = check_scores(case, igia, seen)
    assert igia.total_parameters == original.num_parameters()
    plan = gradpruner.Plan(LAYERS, drop=[1, 4], merge=[DONOR], model=igia.model)
    gradpruner.apply_folder(folder / "full", folder / "small", plan, igia)
    small = AutoModelForCausalLM.from_pretrained(folder / "small")
    changed, row.merged = merged_weights(case, seen, original, small, names)
    check_smaller(small, original, changed)
    with pytest.raises(gradpruner.UnsupportedModel, match="merge into the full-precision checkpoint"):
        gradpruner.apply(model, plan, igia, adapters="discard")
    drop = gradpruner.Plan(LAYERS, drop=REMOVED, model=igia.model)
    if refused(case, row, "apply", lambda: gradpruner.apply(model, drop, adapters="discard")):
        return row
    with model.disable_adapter():
        want = skipping(plain(model), batch(7))
    smaller = gradpruner.apply(model, drop, adapters="discard")
    assert type(bare(layers_of(smaller)[1].get_submodule(names[0]))).__module__.startswith("bitsandbytes")
    with torch.no_grad():
        torch.testing.assert_close(smaller.eval()(input_ids=batch(7), use_cache=False).logits, want)
    row.dropped = "logits, in place"
    return row
