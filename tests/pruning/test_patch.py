"""Patches against a plain computation in float64 that knows nothing of hooks and sums: copies, lists, lstsq."""

from __future__ import annotations

import copy
import weakref

import model_families
import pytest
import torch
from module_states import assert_same, everything
from peft import LoraConfig, get_peft_model
from plain_patches import BATCHES, LAYERS, WRITERS, check, least_squares, recorded, weighted
from torch import nn
from uneven_models import batch, build

import gradpruner
from gradpruner import InvalidArgument, Plan
from gradpruner.model.decoder import Decoder, Weight
from gradpruner.plan import gaps
from gradpruner.pruning import patch as patch_module
from gradpruner.pruning.patch import fit_patches
from gradpruner.pruning.patch_fit import RIDGES, GapFit


@pytest.mark.parametrize(("name", "transposed"), [("llama", False), ("gpt2", True), ("falcon", False)])
@pytest.mark.parametrize("removed", [[2, 3], [5]])
def test_a_patch_is_the_ridge_solution(name, transposed, removed):
    model = build(name)
    (patch,) = fit_patches(model, Plan(LAYERS, drop=removed), BATCHES)
    assert patch.weight.transposed == transposed
    check(patch, model, WRITERS[name], removed[0] - 1, removed[-1], BATCHES)


def test_every_gap_has_its_own_fit():
    model = build()
    patches = fit_patches(model, Plan(LAYERS, drop=[1, 3, 4]), BATCHES)
    assert [(p.weight.layer, p.end) for p in patches] == [(0, 1), (2, 4)]
    for patch in patches:
        check(patch, model, WRITERS["llama"], patch.weight.layer, patch.end, BATCHES)
        (alone,) = fit_patches(model, Plan(LAYERS, drop=list(range(patch.weight.layer + 1, patch.end + 1))), BATCHES)
        assert torch.equal(alone.change, patch.change) and alone.unexplained == patch.unexplained


@pytest.mark.parametrize(("room", "passes"), [(0, 3), (2 * 8 * 64 * (64 + 32), 2), (3 * 8 * 64 * (64 + 32), 1)])
def test_gaps_that_do_not_fit_beside_each_other_are_fitted_in_passes(room, passes, monkeypatch):
    model, plan = build(), Plan(LAYERS, drop=[1, 3, 5])
    at_once = fit_patches(model, plan, BATCHES)
    held, alive, add = [], weakref.WeakSet(), GapFit.add

    def adding(fit, target):
        add(fit, target)
        held[-1].add(fit.end)
        alive.add(fit)
        assert len({fit.end for fit in alive if fit.fitted is not None}) <= -(-3 // passes)

    monkeypatch.setattr(patch_module, "_room", lambda model: room)
    monkeypatch.setattr(GapFit, "add", adding)
    model.register_forward_pre_hook(lambda *_: held.append(set()))
    in_passes = fit_patches(model, plan, iter(BATCHES))  # an iterator can be asked but once
    assert len(held) == 2 * 3 + passes * len(BATCHES)  # two of one row find each writer
    assert all(len(ends) <= -(-3 // passes) for ends in held)
    assert [p.weight for p in in_passes] == [p.weight for p in at_once]
    for one, other in zip(in_passes, at_once, strict=True):
        assert torch.equal(one.change, other.change) and one.unexplained == other.unexplained


def test_room_is_counted_for_both_layouts_and_one_gap_always_fits():
    def writers(transposed):
        shape = (10, 3) if transposed else (3, 10)  # ten inputs
        return {layer: (Weight(layer, "w", shape, transposed), nn.Identity()) for layer in (0, 4, 7)}

    size = 2 * 4 * 10 * (10 + 3)
    for transposed in (False, True):
        for room, want in [
            (0, [[0], [4], [7]]),
            (2 * size - 1, [[0], [4], [7]]),
            (2 * size, [[0, 4], [7]]),
            (float("inf"), [[0, 4, 7]]),
        ]:
            assert patch_module._passes(writers(transposed), room) == want
    assert patch_module._passes({}, 0) == []
    assert patch_module._room(nn.Linear(2, 2)) == float("inf")


def test_sums_grow_in_place(monkeypatch):
    places, add = [], GapFit.add

    def adding(fit, target):
        add(fit, target)
        places.append([part.data_ptr() for sums in (fit.fitted, fit.held_out) for part in vars(sums).values()])

    monkeypatch.setattr(GapFit, "add", adding)
    fit_patches(build(), Plan(LAYERS, drop=[2]), BATCHES)
    assert len(places) == len(BATCHES) and all(place == places[0] for place in places)


def test_the_held_out_rows_choose_among_several_ridges():
    """Otherwise one ridge would do, and the tests above prove nothing of the choice."""
    model = build()
    rows = recorded(model, WRITERS["llama"], 1, 3, BATCHES)
    plain = {ridge: least_squares(*weighted(rows), ridge) for ridge in RIDGES}
    (patch,) = fit_patches(model, Plan(LAYERS, drop=[2, 3]), BATCHES)
    near = [r for r, c in plain.items() if float((patch.change.T.double() - c).norm()) < 1e-3 * float(c.norm())]
    assert len(near) == 1


@pytest.mark.parametrize(
    ("removed", "expected"),
    [
        ([2], {1: 2}),
        ([0, 1], {}),
        ([0, 2, 3, 5], {1: 3, 4: 5}),
        ([1, 2, 3, 4, 5], {0: 5}),
        ([], {}),
        ([1, 3, 5], {0: 1, 2: 3, 4: 5}),
    ],
)
def test_gaps(removed, expected):
    assert gaps(Plan(LAYERS, drop=removed)) == expected
    if 0 not in removed:  # merged layers are gone like dropped ones, whatever they went into
        assert gaps(Plan(LAYERS, merge=dict.fromkeys(removed, 0))) == expected


def test_a_gap_at_the_very_start_is_left_alone():
    assert fit_patches(build(), Plan(LAYERS, drop=[0, 1]), BATCHES) == []
    patches = fit_patches(build(), Plan(LAYERS, drop=[0, 3]), BATCHES)
    assert [(p.weight.layer, p.end) for p in patches] == [(2, 3)]


def test_what_is_linear_is_reproduced():
    """Layer 3 adds a linear map of what enters layer 2's writer: with the patch, layer 2 does the same alone."""
    model, ids = build(), model_families.tokens(rows=40, length=14)
    layers, writer = model.model.layers, model.model.layers[2].mlp.down_proj
    kept, linear = {}, writer.forward
    mixing = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * 0.3

    def keeping(x):
        kept["x"] = x
        return linear(x)

    writer.forward = keeping
    layers[3].forward = lambda hidden, *args, **kwargs: hidden + kept["x"] @ mixing

    def state(seen):
        with torch.no_grad():
            return seen(input_ids=ids, use_cache=False).logits

    dense = state(model)
    plan = Plan(LAYERS, drop=[3])
    patches = fit_patches(model, plan, [{"input_ids": rows} for rows in ids.split(8)])
    assert len(patches) == 1 and patches[0].unexplained < 1e-3
    cut = state(gradpruner.apply(copy.deepcopy(model), plan))
    patched = state(gradpruner.apply(model, plan, patches=patches))
    far = float((cut - dense).norm() / dense.norm())
    assert far > 0.3 and float((patched - dense).norm() / dense.norm()) < 0.05 * far


def test_padding_counts_for_nothing():
    model, plan = build(), Plan(LAYERS, drop=[2, 3])
    (patch,) = fit_patches(model, plan, BATCHES)
    noisy, wide = [], []
    for inputs in BATCHES:
        ids = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], 5)
        noisy.append({**inputs, "input_ids": ids})
        zeros = torch.zeros(len(ids), 3, dtype=torch.long)
        wide.append({k: torch.cat([inputs[k], zeros], 1) for k in ("input_ids", "attention_mask")})
    for others in (noisy, wide):
        (other,) = fit_patches(model, plan, others)
        assert torch.allclose(other.change, patch.change, atol=1e-4) and other.unexplained == pytest.approx(
            patch.unexplained
        )
    (bare,) = fit_patches(model, plan, [{"input_ids": inputs["input_ids"]} for inputs in BATCHES])
    assert not torch.allclose(bare.change, patch.change, atol=1e-2)  # without a mask padding is text
    check(bare, model, WRITERS["llama"], 1, 3, [{"input_ids": inputs["input_ids"]} for inputs in BATCHES])


def test_labels_are_ignored():
    model, plan, seen = build(), Plan(LAYERS, drop=[2, 3]), []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    bare = [{k: v for k, v in inputs.items() if k != "labels"} for inputs in BATCHES]
    patches = [fit_patches(model, plan, given)[0] for given in (BATCHES, bare)]
    assert torch.equal(patches[0].change, patches[1].change)
    assert all("labels" not in names for names in seen)
    # one forward of each batch, and two of one row to find the writer
    assert len(seen) == 2 * (len(BATCHES) + 2)


@pytest.mark.parametrize("trouble", ["none", "batches", "first forward", "later forward", "writer"])
def test_fitting_leaves_the_model_as_it_was(trouble):
    model, plan = build(), Plan(LAYERS, drop=[1, 3])
    model.train()
    model.model.layers[1].eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 > 0)
        parameter.grad = torch.ones_like(parameter) if index % 2 else None
    before = everything(model)
    bad = {"input_ids": torch.tensor([[3, 10**6]])}

    def given():
        if trouble == "first forward":
            yield bad
        yield from BATCHES
        if trouble == "later forward":
            yield bad
        if trouble == "batches":
            raise IndexError("no more")

    if trouble == "none":
        assert len(fit_patches(model, plan, given())) == 2
    else:
        original, calls = model.model.layers[2].mlp.down_proj.forward, []
        if trouble == "writer":  # the second forward of the search, when outputs are shifted

            def failing(x):
                calls.append(1)
                if len(calls) == 2:
                    raise IndexError("no memory")
                return original(x)

            model.model.layers[2].mlp.down_proj.forward = failing
        with pytest.raises(IndexError):
            fit_patches(model, plan, given())
        model.model.layers[2].mlp.down_proj.__dict__.pop("forward", None)
    assert_same(everything(model), before)


@pytest.mark.parametrize(
    ("name", "removed", "found"),
    [
        ("gemma2", [2], []),  # a norm between the last linear and the stream
        ("olmo2", [2], []),
        ("mixtral", [2, 4], []),  # experts are many
        ("qwen3-moe-sparse-step", [2], []),
        ("qwen3-moe-mlp-only", [1, 5], [4]),  # layer 4 has no experts
        ("gpt-oss", [2], []),
    ],
)
def test_layers_without_a_linear_that_writes_to_the_stream_get_none(name, removed, found):
    model = build(name)
    with torch.no_grad():
        for parameter in Decoder(model).layers.parameters():  # experts that do something
            parameter.mul_(3.0 if parameter.ndim == 3 else 1.0)
    before = everything(model)
    patches = fit_patches(model, Plan(LAYERS, drop=removed), BATCHES)
    assert [p.weight.layer for p in patches] == found
    assert_same(everything(model), before)
    assert Decoder(gradpruner.apply(model, Plan(LAYERS, drop=removed), patches=patches)).layers is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_half_precision_finds_its_writer_too(name, dtype):
    plan = Plan(LAYERS, drop=[2, 3])
    (full,) = fit_patches(build(name), plan, BATCHES)
    model = build(name).to(dtype)
    (half,) = fit_patches(model, plan, BATCHES)
    assert half.weight == full.weight and half.change.dtype == torch.float32
    assert half.unexplained == pytest.approx(full.unexplained, rel=0.2)
    weight = Decoder(model).parameter(half.weight).detach().clone()
    smaller = gradpruner.apply(model, plan, patches=[half])
    kept = Decoder(smaller)
    stored = kept.parameter(next(w for w in kept.weights if (w.layer, w.name) == (1, half.weight.name)))
    assert torch.equal(stored, (weight.float() + half.change).to(dtype))  # added in float32, rounded once


def test_no_batches_are_refused():
    model = build()
    before = everything(model)
    with pytest.raises(InvalidArgument, match="batches is empty"):
        fit_patches(model, Plan(LAYERS, drop=[2]), [])
    assert_same(everything(model), before)


def test_too_few_rows_to_hold_any_out_give_no_patch():
    assert fit_patches(build(), Plan(LAYERS, drop=[2]), [batch([9, 12, 6, 7], 1)]) == []


def with_adapters(model):
    torch.manual_seed(3)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return wrapped


def test_the_fit_sees_adapters():
    model, plan = with_adapters(build()), Plan(LAYERS, drop=[1, 3])
    merged = copy.deepcopy(model).merge_and_unload()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    patches = fit_patches(model, plan, BATCHES)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for patch, plain, bare in zip(
        patches, fit_patches(merged, plan, BATCHES), fit_patches(build(), plan, BATCHES), strict=True
    ):
        size = float(plain.change.norm())
        assert patch.weight == plain.weight and float((patch.change - plain.change).norm()) < 1e-3 * size
        assert float((patch.change - bare.change).norm()) > 0.1 * size
    kept = gradpruner.apply(model, plan, patches=patches, adapters="keep")
    want = gradpruner.apply(merged, plan, patches=patches)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(kept.parameters(), want.parameters(), strict=True))
