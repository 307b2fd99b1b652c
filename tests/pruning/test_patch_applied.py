"""Patches in a model: added without rounding, verified, saved, refused, and put back."""

from __future__ import annotations

import copy
import dataclasses

import model_families
import pytest
import torch
from model_families import igia_of
from module_states import assert_same, everything
from plain_patches import BATCHES, LAYERS
from transformers import AutoModelForCausalLM
from uneven_models import build

import gradpruner
from gradpruner import InvalidArgument, Plan, UnsupportedModel
from gradpruner.model.decoder import Decoder, Weight
from gradpruner.pruning import apply
from gradpruner.pruning.patch import Patch, fit_patches


def test_a_patch_does_not_round_a_float64_weight():
    model = model_families.build(model_families.CONFIGS["llama"]()).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-12 * torch.randn_like(parameter))
    path = "mlp.down_proj.weight"
    before = model.model.layers[0].get_parameter(path).detach().clone()
    change = torch.randn(before.shape) * 1e-2
    weight = Weight(0, path, tuple(before.shape))
    gradpruner.apply(model, Plan(LAYERS, drop=[1]), patches=[Patch(weight, 1, change, 0.5)])
    assert torch.equal(model.model.layers[0].get_parameter(path), before + change.double())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_patched_cut_is_verified_and_reloads_bit_for_bit(name, tmp_path):
    model, plan = build(name), Plan(LAYERS, drop=[1, 4, 5])
    dense = copy.deepcopy(model)
    patches = fit_patches(model, plan, BATCHES)
    assert [p.weight.layer for p in patches] == [0, 3]
    smaller = gradpruner.apply(model, plan, patches=patches)
    for new, old in enumerate(plan.kept):
        for path, got in Decoder(smaller).layers[new].named_parameters():
            want = Decoder(dense).layers[old].get_parameter(path).detach()
            mine = [p.change for p in patches if (p.weight.layer, p.weight.name) == (old, path)]
            assert torch.equal(got, want + mine[0] if mine else want), (old, path)
    gradpruner.save(smaller, tmp_path / "small", plan=plan)
    again, state = AutoModelForCausalLM.from_pretrained(tmp_path / "small").state_dict(), smaller.state_dict()
    assert again.keys() == state.keys() and all(torch.equal(again[k], v) for k, v in state.items())


def test_a_patch_brings_the_cut_model_closer():
    model, plan = build(), Plan(LAYERS, drop=[2, 3])
    ids = model_families.tokens(rows=48, length=14)
    patches = fit_patches(model, plan, [{"input_ids": rows} for rows in ids[:40].split(8)])

    def states(seen):
        with torch.no_grad():
            return seen(input_ids=ids[40:], use_cache=False, output_hidden_states=True).hidden_states

    target = states(model)[4]
    cut, patched = (states(gradpruner.apply(copy.deepcopy(model), plan, patches=p))[2] for p in ((), patches))
    error = [float(((s - target).norm(dim=-1) / target.norm(dim=-1)).square().mean()) for s in (cut, patched)]
    assert error[1] < 0.5 * error[0] and patches[0].unexplained < 0.6


def test_patches_of_another_plan_are_refused():
    model, plan = build(), Plan(LAYERS, drop=[2, 3])
    patches = fit_patches(model, plan, BATCHES)
    before = everything(model)
    unknown = dataclasses.replace(patches[0].weight, name="mlp.no_proj.weight")
    for other, given, message in [
        (Plan(LAYERS, drop=[2]), patches, r"layer 1 mlp.down_proj.weight up to layer 3 does not belong to a gap"),
        (Plan(LAYERS, drop=[4]), patches, "does not belong"),
        (Plan(LAYERS, drop=[1, 2, 3]), patches, "does not belong"),
        (plan, [Patch(unknown, 3, patches[0].change, 0.5)], "no_proj.* does not belong"),
        (plan, [patches[0], patches[0]], "not the only one of its gap"),
    ]:
        with pytest.raises(InvalidArgument, match=message):
            gradpruner.apply(model, other, patches=given)
    with pytest.raises(InvalidArgument, match="the plan is for 5 decoder layers; the model has 6"):
        fit_patches(model, Plan(5, drop=[2]), BATCHES)
    Decoder(model).parameter(patches[0].weight).quant_state = object()  # as bitsandbytes marks its own
    with pytest.raises(UnsupportedModel, match=r"mlp.down_proj.weight: the weight is quantised"):
        gradpruner.apply(model, plan, patches=patches)
    assert fit_patches(model, plan, BATCHES) == []
    assert_same(everything(model), before)


def test_a_weight_that_was_merged_and_patched_is_put_back(monkeypatch):
    model, plan = build(), Plan(LAYERS, drop=[3], merge=[2])
    igia, patches = igia_of(model), fit_patches(model, plan, BATCHES)
    assert [p.weight.layer for p in patches] == [1] and plan.donors == {1: (2,)}
    before = everything(model)

    def fail(*args):
        merged = model.model.layers[1].mlp.down_proj.weight
        assert not torch.equal(merged, before["values"]["model.layers.1.mlp.down_proj.weight"])
        raise KeyboardInterrupt

    monkeypatch.setattr(apply, "_check_logits", fail)
    with pytest.raises(KeyboardInterrupt):
        gradpruner.apply(model, plan, igia, patches=patches)
    assert_same(everything(model), before)
    monkeypatch.undo()
    merged = gradpruner.apply(copy.deepcopy(model), plan, igia).model.layers[1].mlp.down_proj.weight
    both = gradpruner.apply(model, plan, igia, patches=patches).model.layers[1].mlp.down_proj.weight
    assert torch.equal(both, merged + patches[0].change)
