"""Probe, scores, threshold and merge on a random 8-layer Llama against the plain float64 oracle in oracle.py."""

from __future__ import annotations

import copy

import oracle
import pytest
import torch
from thinned import every, thinned
from tiny_llama import LAYERS, NAMES, RANK, STEPS, batch, llama, lora, trainable

import gradpruner
from gradpruner import ops
from gradpruner.probe.importance import Dense, Factors


def adapters(model):
    layers = model.get_base_model().model.layers
    return [[layers[j].get_submodule(name) for name in NAMES] for j in range(LAYERS)]


def seen_gradients(model):
    """What a reader of the method would write down before each step: gA and gB of every adapter, cloned."""
    return [
        [(m.lora_A["default"].weight.grad.clone(), m.lora_B["default"].weight.grad.clone()) for m in layer]
        for layer in adapters(model)
    ]


def train_and_watch(model, steps=STEPS, micro_batches=1, probe_steps=None, clip=1.0):
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
    probe, seen = gradpruner.Probe(model), []
    with probe.watching(optimizer, steps=probe_steps or steps):
        for i in range(steps):
            for micro in range(micro_batches):
                ids = batch(100 * i + micro)
                (model(input_ids=ids, labels=ids).loss / micro_batches).backward()
            torch.nn.utils.clip_grad_norm_(trainable(model), clip)
            seen.append(seen_gradients(model))
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)  # writes zeros into the gradients' own memory
    return probe.igia, seen


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("kind", ["squared", "norm", "normalized"])
def test_scores_to_1e_6(kind, micro_batches):
    igia, seen = train_and_watch(lora(llama()), micro_batches=micro_batches)
    expected = oracle.layer_scores(seen, kind)
    assert igia.steps == STEPS and igia.skipped == 0 and igia.estimator == "lora"
    for got, want in zip(igia.layer_scores(kind).tolist(), expected, strict=True):
        assert got == pytest.approx(want, rel=1e-6)


def test_first_step_adds_nothing_and_the_probe_stops_itself():
    igia, seen = train_and_watch(lora(llama()), steps=STEPS + 2, probe_steps=STEPS)
    assert igia.steps == STEPS
    assert not igia.square_norms[0].any()  # B = 0, so gA = 0
    expected = oracle.layer_scores(seen[:STEPS], "squared")
    for got, want in zip(igia.layer_scores("squared").tolist(), expected, strict=True):
        assert got == pytest.approx(want, rel=1e-6)


def test_importance_ranks_as_the_oracle_and_keeps_exactly_k():
    igia, seen = train_and_watch(lora(llama()))
    kinds = set()
    for layer in range(LAYERS):
        for n, name in enumerate(NAMES):
            kept = igia.importance[layer, f"{name}.weight"]
            kinds.add(type(kept))
            a = torch.stack([step[layer][n][0] for step in seen])
            b = torch.stack([step[layer][n][1] for step in seen])
            f = oracle.importance(a, b)
            k = f.numel() // 5
            edge = ops.factor_threshold(kept.a, kept.b, k) if isinstance(kept, Factors) else ops.threshold(kept.f, k)
            dense = kept.dense().f
            mask = (dense > edge[0]) | ((dense == edge[0]) & (torch.arange(f.numel()).view(f.shape) <= edge[1]))
            wanted = oracle.mask_of(f, k)
            border = f.flatten().sort(descending=True).values[k - 1]
            assert not ((mask != wanted) & ((f - border).abs() > 1e-5 * border)).any()
            if isinstance(kept, Dense):
                assert int(mask.sum()) == k
    assert kinds == {Dense, Factors}  # both sides of the crossover are exercised


def whole_factors(seed, steps, out, inp):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(-2, 3, (steps, RANK, inp), generator=generator).float()
    return a, torch.randint(-2, 3, (steps, out, RANK), generator=generator).float()


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("dtype", thinned([torch.float32, torch.bfloat16, torch.float16], every(2)))
@pytest.mark.parametrize("stored", thinned(["factors", "dense"], every(2)))
def test_merged_weights_are_bit_exact(dtype, stored, backend, monkeypatch):
    monkeypatch.setenv("GRADPRUNER_BACKEND", backend)
    check_merged_weights(dtype, stored)


def check_merged_weights(dtype, stored):
    """The whole of `apply` on factors whose F is exact in float32, all donors into layer 2 and 5."""
    igia, _ = train_and_watch(lora(llama()), steps=2)
    model = llama(dtype)
    dense = copy.deepcopy(model)
    plan = gradpruner.Plan(LAYERS, drop=[4], merge=[3, 6, 7])
    factors = {(w.layer, w.name): whole_factors(31 * w.layer + n, 3, *w.shape) for n, w in enumerate(igia.weights)}
    importance = {key: Factors(*pair) for key, pair in factors.items()}
    if stored == "dense":
        importance = {key: value.dense() for key, value in importance.items()}
    object.__setattr__(igia, "importance", importance)
    object.__setattr__(igia, "model", igia.model.partition("-")[0])  # the weights are of another dtype now
    small = gradpruner.apply(model, plan, igia, top=0.2)
    for new, old in enumerate(plan.kept):
        donors = plan.donors.get(old, ())
        for name, got in small.model.layers[new].named_parameters():
            before = dense.model.layers[old].get_parameter(name)
            if (old, name) in factors:
                masks = [oracle.mask_of(oracle.importance(*factors[d, name]), before.numel() * 2 // 10) for d in donors]
                values = [dense.model.layers[d].get_parameter(name) for d in donors]
                before = oracle.merge(before.detach(), [v.detach() for v in values], masks)
                assert not donors or not torch.equal(before, dense.model.layers[old].get_parameter(name))
            assert torch.equal(got, before), (old, name)
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == list(range(len(plan.kept)))


@pytest.mark.parametrize(("p", "size", "k"), [(0.57, 100, 57), (0.2, 7, 1), (0.29, 100, 29), (1, 5, 5), (0.07, 100, 7)])
def test_k_is_exact_integer_arithmetic(p, size, k):
    from gradpruner.checks import exact_share

    assert int(exact_share("top", p) * size) == k
